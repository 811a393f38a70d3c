"""What tells a frozen model from another: it is in no checkpoint itself."""

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxdistill.distiller.distiller import Distiller
from fxdistill.models.adapters import base_parameters

SAMPLES = 16  # of each parameter's values, evenly spaced: what is read of a teacher at each save


def targets(distiller: Distiller) -> dict[str, dict[str, Any]]:
    """Frozen models by name, and the frozen base below the adapters of a model that learns."""
    frozen = distiller.objective.frozen
    found: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for t, model in sorted(distiller.models.items(), key=lambda item: item[0] not in frozen):
        below = None if t in frozen else base_parameters(model)
        named = [(n, p) for n, p in model.named_parameters() if below is None or id(p) in below]
        ids = {id(p) for _, p in named}
        if below is None or not ids <= seen:  # the teacher may be that very base
            found[t if below is None else f"base of {t}"] = _told(model, dict(named))
        seen |= ids
    return dict(sorted(found.items()))


def other_targets(saved: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """A warning for each frozen model that is another one than the run was saved with.

    That is no error: a teacher is in no checkpoint, and its path may have changed without it.
    """
    theirs, ours = saved.get("targets", {}), here["targets"]
    for name in [name for name in theirs if name in ours]:
        same = _differ_by(theirs[name], ours[name])
        if same is None:
            continue
        a, b = (_target(each[name]) for each in (theirs, ours))
        yield (
            f"another {name} than the checkpoint was saved with: it had {a}, this run has "
            f"{b}{same}. A frozen model is in no checkpoint, so the run goes on with this one, "
            "and its losses are not those of the run that was saved."
        )


def _differ_by(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """In what two models differ that names and counts do not show; ``None`` if in nothing."""
    if any(saved[key] != here[key] for key in ("class", "path", "parameters")):
        return ""
    if saved["shapes"] != here["shapes"]:
        return " of other shapes"
    theirs, ours = saved.get("values", {}), here["values"]
    other = [name for name in theirs if name in ours and theirs[name] != ours[name]]
    return f" of other values ({other[0]!r} is the first)" if other else None


def _target(told: Mapping[str, Any]) -> str:
    path = f" {told['path']!r}" if told["path"] else ""
    return f"{told['class']}{path} ({told['parameters']:,} parameters)"


def _told(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    sizes = {name: list(p.shape) for name, p in parameters.items()}
    return {
        "class": type(model).__name__,
        "path": str(getattr(getattr(model, "config", None), "name_or_path", "") or ""),
        "parameters": sum(p.numel() for p in parameters.values()),
        "shapes": hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:16],
        "values": _values(parameters),
    }


def _values(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """A checksum of some values of each parameter that is a plain tensor, whole on this rank.

    Those of quantised weights and of shards are left out, and so are not compared.
    """
    groups: dict[Any, dict[str, Tensor]] = {}
    for name, p in parameters.items():
        if type(p) in (nn.Parameter, Tensor) and not p.is_meta and p.numel() and p.is_contiguous():
            flat = p.detach().view(-1)
            some = flat[:: -(-len(flat) // SAMPLES)]
            groups.setdefault((p.dtype, p.device), {})[name] = some
    found = {}
    for group in groups.values():  # one copy from each device for each dtype
        raw = torch.cat(list(group.values())).cpu().view(torch.uint8).numpy().tobytes()
        at = 0
        for name, some in group.items():
            end = at + len(some) * some.element_size()
            found[name] = zlib.crc32(raw[at:end])
            at = end
    return {name: found[name] for name in parameters if name in found}
