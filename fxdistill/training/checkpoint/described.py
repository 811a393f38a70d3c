"""What a checkpoint says of its distiller in words, so that another one can be told from it."""

import functools
from dataclasses import replace
from typing import Any

from torch import nn

from fxdistill.base.tensors import is_lazy
from fxdistill.distiller.distiller import Distiller
from fxdistill.losses.names import is_named, loss_name
from fxdistill.mapping.match import Match
from fxdistill.models.tap import port_text
from fxdistill.training.checkpoint.code import PLAIN
from fxdistill.training.checkpoint.terms import new_name, terms_of

# What a term compares. The weight is a setting, which is restored; the rest of a term follows.
_SAID = ("of", "student", "teacher", "teachers", "target", "tap", "shift", "has_module", "weights")
MODULES = "modules of term"


def described(distiller: Distiller) -> dict[str, dict[str, str]]:
    """Models, matches, terms, each by name, and options, as text: what must be alike to go on."""
    objective = distiller.objective
    frozen = objective.frozen
    models = {t: "it is frozen" if t in frozen else "it learns" for t in distiller.models}
    matches: dict[str, str] = {}
    for match in distiller.matches:
        name = f"{match.student}:{port_text(match.student_port)}"
        matches[new_name(name, list(matches))] = _match(match)
    terms = list(terms_of(objective))
    losses = {f"loss_modules.{i}": each for i, each in enumerate(distiller.loss_modules)}
    return {
        "model": models,
        "match": matches,
        "term": {name: _term(term, item) for name, term, item in terms},
        "option": {
            "task": str(objective.task),
            "vocab_size": str(objective.vocab_size),
            "importance": _importance(objective.importance),
        },
        MODULES: {name: text for name, term, _ in terms if (text := _modules(term))},
        "loss": {name: _own(each) for name, each in losses.items() if is_named(each)},
    }


def kept_by_modules(distiller: Distiller) -> dict[str, str]:
    """Numbers and words that modules of the user's own keep beside their state, by path.

    They may be settings, or count steps: whoever wrote the module knows, and we do not.
    """
    beside = {
        "projections": dict(distiller.projections.named_children()),
        "loss_modules": dict(distiller.loss_modules.named_children()),
        "heads": dict(distiller.heads.named_children()),
    }
    found = {}
    for kind, modules in beside.items():
        for name, module in modules.items():
            if kind == "loss_modules" and is_named(module):
                continue
            for path, inner in module.named_modules(prefix=f"{kind}.{name}"):
                lazy = any(map(is_lazy, inner.parameters(recurse=False)))
                if not lazy and (said := _kept(inner)):
                    found[path] = said
    return found


def _term(term: Any, item: Any) -> str:
    own = f" of {_told(item)}" if item is not term else ""
    return f"{_loss(term.loss)}: {_told(term)}{own}"


def _told(term: Any) -> str:
    return ", ".join(f"{k} {_said(getattr(term, k))}" for k in _SAID if getattr(term, k, None))


def _modules(term: Any) -> str:
    """Which of the distiller's modules a term uses: states are saved by their numbers."""
    kinds = {"projections": getattr(term, "projection", None), "loss_modules": term.module}
    return " and ".join(f"{kind}.{i}" for kind, i in kinds.items() if i is not None)


def _importance(importance: Any) -> str:
    """All of it but the threshold, which is a setting."""
    if importance is None:
        return "None"
    said = [importance.score if isinstance(importance.score, str) else loss_name(importance.score)]
    said += [] if importance.keep is None else [f"keep={importance.keep!r}"]
    said += [] if importance.threshold is None else ["with a threshold"]
    said += ["features=True"] if importance.features else []
    return ", ".join(said)


def _match(match: Match) -> str:
    loss = "" if match.loss is None else _loss(match.loss)
    said = ", ".join(filter(None, (loss, replace(match, weight=1.0, loss=None).options)))
    return f"{match.teacher}:{port_text(match.teacher_port)}" + (f" ({said})" if said else "")


def _said(value: Any) -> str:
    return " and ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _loss(loss: Any) -> str:
    """The name of a loss, and those of its options that are numbers or words."""
    options = loss.keywords if isinstance(loss, functools.partial) else {}
    simple = {k: v for k, v in options.items() if isinstance(v, (int, float, str, type(None)))}
    told = ", ".join(f"{name}={value!r}" for name, value in sorted(simple.items()))
    return f"{loss_name(loss)}({told})" if told else loss_name(loss)


def _own(loss: nn.Module) -> str:
    """A loss of this library that is a module, with its settings."""
    return f"{loss_name(loss)}({_kept(loss)})"


def _kept(module: nn.Module) -> str:
    """The attributes of a module that are numbers or words, but for whether it trains."""
    own = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
    return ", ".join(f"{k}={v!r}" for k, v in sorted(own.items()) if isinstance(v, PLAIN))
