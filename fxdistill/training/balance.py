"""How strongly each term pulls at the student, and weights that balance the terms by it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fxdistill import parallel
from fxdistill.distiller.distiller import Distiller
from fxdistill.errors import OptionError, did_you_mean

WEIGHTS = {"logits": "logit_weight", "labels": "label_weight", "features": "feature_weight"}


def gradient_norms(
    distiller: Distiller, batch: Mapping[str, Any] | tuple[Any, ...]
) -> dict[str, float]:
    """‖∂L_k/∂θ‖₂ of each unweighted term L_k, over the student's parameters θ.

    The step runs once, eagerly and as the models are, and then one backward a term. So it makes the
    logits, and takes the time of a step with as many backwards: once in a while, outside of the
    loop. Gradients, buffers, modes and random states stay as they are. With DTensors the norm is
    that of the whole gradient; without them each rank of a process group has its own samples, and
    the mean of their norms is returned. All ranks call it.

    Args:
        distiller: What ``fxdistill.wrap`` returned.
        batch: The keywords of a call in a dict, or a tuple of positional inputs.

    Returns:
        The norms by term: "logits" and "labels", where the total has them; "features", the mean
        over the matches with their weights, Σ w_i·loss_i / N; each match by its path, and the
        terms of further heads by theirs ("name:logits").

    Raises:
        OptionError: ``batch`` is neither a dict nor a tuple, or the parameters are FSDP2's.
    """
    norms = distiller.gradient_norms(batch)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        each = parallel.checkpoints.everyone(norms)
        norms = {name: sum(one[name] for one in each) / len(each) for name in norms}
    return norms


def balance(
    distiller: Distiller,
    batch: Mapping[str, Any] | tuple[Any, ...],
    target: Mapping[str, float],
) -> dict[str, float]:
    """Set weights, so that the gradients of the terms stand in the ratio of the targets.

    The weighted norm of a term is its weight times its ``gradient_norms``: λ·‖∂L_k/∂θ‖,
    λ_features·w_i/N·‖∂loss_i/∂θ‖ for a match, λ·w_h·‖∂L_h/∂θ‖ for a term of a head. Weights are
    set so that these norms are c·target for all terms named, with the c that keeps their sum as it
    was before; other weights stay.

    ```python
    fxdistill.balance(distiller, batch, target={"logits": 1.0, "labels": 1.0, "features": 0.3})
    ```

    Args:
        distiller: What ``fxdistill.wrap`` returned.
        batch: As for ``gradient_norms``.
        target: By term, a number from 0; at least two terms. "features" and matches are not named
            together, because the one is the sum of the others.

    Returns:
        The weights that were set, by term.

    Raises:
        OptionError: A term is not in the total, a target is no such number, or a gradient is 0 or
            not finite, so that no weight gives it its share. Nothing is changed.
    """
    named = _checked(target, distiller.objective.weighed, distiller.objective.names.heads)
    norms = gradient_norms(distiller, batch)
    settings = {name: float(value) for name, value in distiller.settings.items()}
    for name, share in named.items():
        _require_norm(name, norms, share)
    pulls = {name: norms[name] * _factor(distiller, name, settings) for name in named}
    before = sum(abs(settings[WEIGHTS.get(k, k)]) * pull for k, pull in pulls.items())
    scale = (before or 1.0) / sum(named.values())
    weights: dict[str, float] = {}
    for name in sorted(named, key=lambda name: name not in WEIGHTS):  # others multiply by these
        pull = norms[name] * _factor(distiller, name, settings)
        if named[name] and not pull:
            raise OptionError(f"balance: {name!r} is under a global weight of 0: raise that first")
        weights[name] = scale * named[name] / pull if named[name] else 0.0
        settings[WEIGHTS.get(name, name)] = weights[name]
    of_all: dict[str, Any] = {
        WEIGHTS[name]: weight for name, weight in weights.items() if name in WEIGHTS
    }
    others = {name: weight for name, weight in weights.items() if name not in WEIGHTS}
    distiller.set(weights=others, **of_all)
    return {name: weights[name] for name in named}


def _checked(target: Any, matches: Sequence[str], heads: Sequence[str]) -> dict[str, float]:
    """The targets as numbers; raises OptionError."""
    named = dict(target) if isinstance(target, Mapping) else {}
    if len(named) < 2:
        raise OptionError(f"target={target!r}: a dict of two terms or more, whose ratio is set")
    for name, value in named.items():
        number = isinstance(value, (int, float)) and math.isfinite(value)
        if not number or value < 0:
            raise OptionError(f"target={{{name!r}: {value!r}}}: a number from 0")
    if not any(named.values()):
        raise OptionError("target: all are 0, and no term would be left")
    for name in named:
        if name not in (*WEIGHTS, *matches, *heads):
            near = did_you_mean(str(name), (*WEIGHTS, *matches, *heads))
            raise OptionError(f"target: no term {name!r}. Nearest: {near}.")
    if "features" in named and any(name in matches for name in named):
        raise OptionError(
            "target names 'features' and matches: 'features' is their weighted sum. Name either."
        )
    return {name: float(value) for name, value in named.items()}


def _require_norm(name: str, norms: Mapping[str, float], share: float) -> None:
    """Raise OptionError where no weight can give a term its share."""
    if name not in norms:
        raise OptionError(
            f"target: {name!r} is not in the total of this batch, or learns nothing. It has: "
            f"{', '.join(norms) or 'no terms'}."
        )
    if not math.isfinite(norms[name]) or (share and not norms[name]):
        raise OptionError(
            f"balance: the gradient of {name!r} has the norm {norms[name]:g}: no weight gives it "
            "its share. distiller.explain(batch) says what is not finite."
        )


def _factor(distiller: Distiller, name: str, settings: Mapping[str, float]) -> float:
    """What multiplies a term besides its own weight."""
    if name in WEIGHTS:
        return 1.0
    for head in distiller.objective.heads:
        for term in head.terms:
            if term.name == name:
                return settings["logit_weight" if term is head.logits else "label_weight"]
    return settings["feature_weight"] / len(distiller.objective.weighed)
