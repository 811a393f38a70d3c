"""What a checkpoint says of its distiller in words, so that another one can be told from it."""

import functools
import hashlib
import json
from dataclasses import fields, replace
from typing import Any

from torch import nn

from fxdistill.distiller.distiller import Distiller
from fxdistill.losses.names import loss_name
from fxdistill.mapping.match import Match

# What a term compares. The weight is a setting, which is restored; the rest of a term follows.
_SAID = ("of", "student", "teacher", "teachers", "target", "tap", "shift", "has_module", "weights")


def described(distiller: Distiller) -> dict[str, dict[str, str]]:
    """Models, matches and terms, each by name, as text: what must be alike to go on."""
    frozen = distiller.objective.frozen
    models = {t: "it is frozen" if t in frozen else "it learns" for t in distiller.models}
    matches: dict[str, str] = {}
    for match in distiller.matches:
        name = f"{match.student}:{match.student_port}"
        matches[_new(name, matches)] = _match(match)
    return {"model": models, "match": matches, "term": _terms(distiller.objective)}


def targets(distiller: Distiller) -> dict[str, dict[str, Any]]:
    """What tells a frozen model from another, by name: it is in no checkpoint itself."""
    frozen = distiller.objective.frozen
    return {t: _fingerprint(m) for t, m in sorted(distiller.models.items()) if t in frozen}


def _fingerprint(model: nn.Module) -> dict[str, Any]:
    sizes = {name: list(p.shape) for name, p in model.named_parameters()}
    return {
        "class": type(model).__name__,
        "path": str(getattr(getattr(model, "config", None), "name_or_path", "") or ""),
        "parameters": sum(p.numel() for p in model.parameters()),
        "shapes": hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:16],
    }


def _terms(objective: Any) -> dict[str, str]:
    """Each term by name, whatever kinds of terms an objective has."""
    values = [getattr(objective, field.name) for field in fields(objective)]
    items: list[Any] = [item for value in values if isinstance(value, tuple) for item in value]
    found: dict[str, str] = {}
    for item in [item for item in items if hasattr(item, "name")]:
        for term in getattr(item, "terms", (item,)):  # a head has several
            own = f" of {_told(item)}" if item is not term else ""
            found[_new(str(term.name), found)] = f"{_loss(term.loss)}: {_told(term)}{own}"
    return found


def _told(term: Any) -> str:
    return ", ".join(f"{k} {_said(getattr(term, k))}" for k in _SAID if getattr(term, k, None))


def _match(match: Match) -> str:
    loss = "" if match.loss is None else _loss(match.loss)
    said = ", ".join(filter(None, (loss, replace(match, weight=1.0, loss=None).options)))
    return f"{match.teacher}:{match.teacher_port}" + (f" ({said})" if said else "")


def _said(value: Any) -> str:
    return " and ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _loss(loss: Any) -> str:
    """The name of a loss, and those of its options that are numbers or words."""
    options = loss.keywords if isinstance(loss, functools.partial) else {}
    simple = {k: v for k, v in options.items() if isinstance(v, (int, float, str, type(None)))}
    told = ", ".join(f"{name}={value!r}" for name, value in sorted(simple.items()))
    return f"{loss_name(loss)}({told})" if told else loss_name(loss)


def _new(name: str, taken: dict[str, str]) -> str:
    """``name``, with a number behind it where it is taken."""
    count = sum(other == name or other.startswith(f"{name} #") for other in taken)
    return f"{name} #{count + 1}" if count else name
