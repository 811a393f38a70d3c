"""Means that are equal on one device and on shards: sums over counts, never ``mean()``."""

from collections.abc import Callable

import torch
from torch import Tensor

# From sums over this rank's shard of the width to sums over the whole width; one device has all.
Whole = Callable[[Tensor], Tensor]
# From student, teacher, weights, axes of the width, its size and a Whole to each token's value.
Values = Callable[[Tensor, Tensor, Tensor | None, tuple[int, ...], int, Whole], Tensor]


IGNORE = -100


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Σ w·value / Σ w over all elements; 0, with zero gradients, where Σ w = 0.

    A value whose weight is zero does not count even if it is not finite.
    """
    if weights is None:
        return values.sum() / values.numel()
    w = weights.to(values.dtype)
    total = w.sum()
    kept = torch.where(w != 0, values * w, torch.zeros_like(values))
    return kept.sum() / torch.where(total == 0, torch.ones_like(total), total)


def counted(x: Tensor, weights: Tensor | None) -> Tensor:
    """``x`` with 0 where the weight is 0, so that such values (even NaN) reach no gradient."""
    if weights is None:
        return x
    weights = weights.reshape(*weights.shape, *(1,) * (x.ndim - weights.ndim))
    return torch.where(weights != 0, x, 0)


def width_axes(x: Tensor, weights: Tensor | None) -> tuple[int, ...]:
    """The axes that make up one value's width.

    With weights: all axes after those of the weights. Without: the last axis, and for feature maps
    (4 axes or more, ``[B, C, H, W]``) all axes after the batch, so that the mean is per sample.
    """
    if weights is not None:
        leading = weights.ndim
    else:
        leading = x.ndim - 1 if x.ndim <= 3 else 1
    return tuple(range(min(leading, x.ndim - 1), x.ndim))


def width_of(x: Tensor, axes: tuple[int, ...]) -> int:
    """How many elements lie along ``axes``."""
    size = 1
    for axis in axes:
        size = size * x.shape[axis]
    return size
