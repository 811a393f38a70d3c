"""Means that are the same on one device and on shards: sums over counts, never ``mean()``."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


# What a shard of the width has summed -> the sum over all of the width. One device has it all.
Whole = Callable[[Tensor], Tensor]
# Of student, teacher, weights, the axes of the width and its size: the value of each token.
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
    """``x`` with 0 where the weight is 0: what does not count reaches no gradient, NaN or not."""
    if weights is None:
        return x
    weights = weights.reshape(*weights.shape, *(1,) * (x.ndim - weights.ndim))
    return torch.where(weights != 0, x, 0)


def width_axes(x: Tensor, weights: Tensor | None) -> tuple[int, ...]:
    """The axes that make up one value's width.

    With weights: all axes behind those of the weights. Without: the last one, and for feature maps
    (4 axes and more, ``[B, C, H, W]``) everything behind the batch, so that the mean is per sample.
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
