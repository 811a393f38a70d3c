"""Means that are equal on one device and on shards: sums over counts, never ``mean()``."""

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from fxdistill.base.autocast import has_autocast

# From sums over this rank's shard of the width to sums over the whole width; one device has all.
Whole = Callable[[Tensor], Tensor]
# From student, teacher, weights, axes of the width, its size and a Whole to each token's value.
Values = Callable[[Tensor, Tensor, Tensor | None, tuple[int, ...], int, Whole], Tensor]
# How a value follows from its width, of which ranks may have parts: it is a sum over the width
# ("sum"), or another function of such sums ("sums").
Width = Literal["sum", "sums"]

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


F = TypeVar("F", bound=Callable[..., Any])


def in_full_precision(loss: F) -> F:
    """Switch autocast off in ``loss``: it would form the products of samples in half precision."""

    @functools.wraps(loss)
    def run(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        kind = first.device.type
        if not has_autocast(kind):
            return loss(first, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return loss(first, *args, **kwargs)

    return run  # type: ignore[return-value]


def root(squares: Tensor) -> Tensor:
    """The square root, with gradient 0 at 0."""
    zero = squares == 0
    return torch.where(zero, 0, torch.where(zero, 1, squares).sqrt())


def in_range(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """``x``, and vectors over ``axes`` whose squares no float32 holds in units of their maximum.

    For functions that no scale of a vector changes: for these its derivative, for which that
    maximum is a constant, is exact.
    """
    most = x.detach().abs().amax(axes, keepdim=True)
    usual = (most == 0) | ((most > 1e-9) & (most < 1e9))
    return x / torch.where(usual, 1, most)


def normalized(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """``x / ‖x‖`` over ``axes``; a vector of zeros stays, with zero gradient."""
    x = in_range(x, axes)
    norm = root(x.square().sum(axes, keepdim=True))
    return x / torch.where(norm == 0, 1, norm)


def huber(difference: Tensor) -> Tensor:
    """d²/2 where ``|d| < 1``, and ``|d| - 1/2`` elsewhere."""
    size = difference.abs()
    return torch.where(size < 1, 0.5 * difference.square(), size - 0.5)


def is_map(x: Tensor, weights: Tensor | None) -> bool:
    """Whether ``x`` is a map ``[B, C, *places]`` of 4 axes or more, with its channels on axis 1.

    Nothing weighs a map, or weights ``[B]`` or ``[B, *places]`` do. Weights of other axes, such as
    ``[B, L]`` of ``[B, L, heads, D]``, say that these lead, and that the last axis is the width.
    """
    if x.ndim < 4:
        return False
    return weights is None or weights.ndim == 1 or weights.shape == (x.shape[0], *x.shape[2:])


def channels_last(x: Tensor) -> Tensor:
    """A map ``[B, C, *places]`` as ``[B, *places, C]``."""
    return x.movedim(1, -1)


def spread(weights: Tensor, over: tuple[int, ...]) -> Tensor:
    """``weights`` of the leading axes, divided evenly among all places of the shape ``over``."""
    places = 1
    for size in over[weights.ndim :]:
        places = places * size
    more = (1,) * (len(over) - weights.ndim)
    return (weights.float().reshape(*weights.shape, *more) / places).expand(over)


def of_samples(weights: Tensor) -> Tensor:
    """The weight of each sample ``[B]``: the mean of those of its places that count."""
    w = weights.flatten(1) if weights.ndim > 1 else weights.unsqueeze(1)
    number = (w != 0).sum(1)
    return w.sum(1) / number.clamp(min=1)


def laid_out(
    student: Tensor, teacher: Tensor, weights: Tensor | None, *, vectors: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both values with the width last, and weights of the axes before it.

    ``vectors`` says that each place has a value of its own (a norm, an angle). Otherwise values are
    sums over the width, and the width of a map is all that follows the axes of its weights.
    """
    of_places = weights is not None and weights.ndim > 1
    if is_map(student, weights) and (vectors or of_places):
        student, teacher = channels_last(student), channels_last(teacher)
    if vectors and weights is not None and weights.ndim < student.ndim - 1:
        weights = spread(weights, tuple(student.shape[:-1]))
    return student, teacher, weights


def width_axes(x: Tensor, weights: Tensor | None, *, vectors: bool) -> tuple[int, ...]:
    """The axes that make up one value's width.

    With weights: all axes after those of the weights. Without: the last axis, and for feature maps
    (4 axes or more, ``[B, C, H, W]``) whose values are sums all axes after the batch, so that the
    mean is per sample.
    """
    if weights is not None:
        leading = weights.ndim
    else:
        leading = x.ndim - 1 if vectors or x.ndim <= 3 else 1
    return tuple(range(min(leading, x.ndim - 1), x.ndim))


def width_of(x: Tensor, axes: tuple[int, ...]) -> int:
    """How many elements lie along ``axes``."""
    size = 1
    for axis in axes:
        size = size * x.shape[axis]
    return size
