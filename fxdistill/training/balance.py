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
        over the matches with their weights, Σ w_i·loss_i / N; and each match by its path.

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

    The weighted norm of a term is its weight times its ``gradient_norms``: λ·‖∂L_k/∂θ‖, and
    λ_features·w_i/N·‖∂loss_i/∂θ‖ for a match. Weights w are set so that these norms are c·target
    for all terms named, with the c that keeps their sum as it was before; other weights stay.

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
    named = _checked(target, distiller.objective.weighed)
    norms = gradient_norms(distiller, batch)
    pulls = {name: _pull(distiller, name, norms) for name in named}
    for name, norm in pulls.items():
        if not math.isfinite(norm) or (norm == 0 and named[name] > 0):
            raise OptionError(
                f"balance: the gradient of {name!r} has the norm {norms[name]:g}, or the weight of "
                "features is 0: no weight gives it its share. distiller.explain(batch) says what "
                "is not finite."
            )
    settings = distiller.settings
    before = sum(abs(float(settings[WEIGHTS.get(k, k)])) * pull for k, pull in pulls.items())
    scale = (before or 1.0) / sum(named.values())
    weights = {k: scale * share / pulls[k] if share else 0.0 for k, share in named.items()}
    of_all = {WEIGHTS[name]: weight for name, weight in weights.items() if name in WEIGHTS}
    matches = {name: weight for name, weight in weights.items() if name not in WEIGHTS}
    distiller.set(weights=matches, **of_all)
    return weights


def _checked(target: Any, matches: Sequence[str]) -> dict[str, float]:
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
        if name not in (*WEIGHTS, *matches):
            near = did_you_mean(str(name), (*WEIGHTS, *matches))
            raise OptionError(f"target: no term {name!r}. Nearest: {near}.")
    if "features" in named and any(name not in WEIGHTS for name in named):
        raise OptionError(
            "target names 'features' and matches: 'features' is their weighted sum. Name either."
        )
    return {name: float(value) for name, value in named.items()}


def _pull(distiller: Distiller, name: str, norms: Mapping[str, float]) -> float:
    """The norm of a term's gradient at a weight of 1: what its weight multiplies."""
    if name not in norms:
        raise OptionError(
            f"target: {name!r} is not in the total of this batch, or learns nothing. It has: "
            f"{', '.join(norms) or 'no terms'}."
        )
    if name in WEIGHTS:
        return norms[name]
    matches = len(distiller.objective.weighed)
    return float(distiller.settings["feature_weight"]) / matches * norms[name]
