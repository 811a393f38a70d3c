"""Losses between hidden states.

Each takes ``student`` and ``teacher`` of one shape, and ``weights`` shaped like their leading axes
(``[B, L]`` for ``[B, L, D]``), or ``None`` to count all tokens alike. The value of a token is
formed over its width D; the result is Σ w·value / Σ w, a scalar in float32 (float64 stays). A map
``[B, C, ...]``, of 4 axes or more, has one value a sample, unless weights are given: then its width
is all that follows their axes.

DTensors give the same value and gradients as one device; see ``losses.sharded.hidden``.
"""

import functools

import torch
from torch import Tensor

from fxdistill.base.nodes import one_node
from fxdistill.base.tensors import is_placed, wide
from fxdistill.losses import sharded
from fxdistill.losses.reduce import Values, Whole, counted, weighted_mean, width_axes, width_of


def _loss(
    values: Values, student: Tensor, teacher: Tensor, weights: Tensor | None, *, additive: bool
) -> Tensor:
    """Σ w·value / Σ w; in an ``additive`` loss, values are sums over the width.

    ``values`` sees one token at a time: on a mesh it is given this rank's tokens only. A loss that
    compares tokens or samples with one another must gather both sides itself.
    """
    if is_placed(student) or is_placed(teacher):
        options = {"additive": additive}
        of_shards: Tensor = sharded.hidden.loss(values, student, teacher, weights, **options)
        return of_shards
    axes = width_axes(student, weights)
    size = width_of(student, axes)
    return weighted_mean(values(student, teacher, weights, axes, size, _all_here), weights)


def _all_here(sums: Tensor) -> Tensor:
    return sums


def _distance(student: Tensor, teacher: Tensor, weights: Tensor | None) -> Tensor:
    return counted(wide(student) - wide(teacher), weights)


def _root(squares: Tensor) -> Tensor:
    """The square root, with gradient 0 at 0."""
    zero = squares == 0
    return torch.where(zero, 0, torch.where(zero, 1, squares).sqrt())


def _mse(
    s: Tensor, t: Tensor, w: Tensor | None, axes: tuple[int, ...], size: int, whole: Whole
) -> Tensor:
    return _distance(s, t, w).square().sum(axes) / size


@one_node
def mse(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """(1/D) Σ (s - t)², the mean over tokens.

    ``F.mse_loss`` is not used: on a sharded DTensor its gradient is too large by the number of
    ranks.
    """
    return _loss(_mse, student, teacher, weights, additive=True)


def _l2(
    s: Tensor, t: Tensor, w: Tensor | None, axes: tuple[int, ...], size: int, whole: Whole
) -> Tensor:
    return _root(whole(_distance(s, t, w).square().sum(axes)))


@one_node
def l2(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """‖s - t‖₂, unsquared, the mean over tokens (the activation loss of Fast-LLM).

    Its gradient by s has length 1 however close s and t are, and is 0 where they are equal.
    """
    return _loss(_l2, student, teacher, weights, additive=False)


def _l1(
    s: Tensor, t: Tensor, w: Tensor | None, axes: tuple[int, ...], size: int, whole: Whole
) -> Tensor:
    return _distance(s, t, w).abs().sum(axes) / size


@one_node
def l1(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """(1/D) Σ |s - t|, the mean over tokens."""
    return _loss(_l1, student, teacher, weights, additive=True)


def _smooth_l1(
    s: Tensor,
    t: Tensor,
    w: Tensor | None,
    axes: tuple[int, ...],
    size: int,
    whole: Whole,
    *,
    beta: float,
) -> Tensor:
    distance = _distance(s, t, w).abs()
    near = distance.square() * (0.5 / beta)
    return torch.where(distance < beta, near, distance - 0.5 * beta).sum(axes) / size


@one_node
def smooth_l1(
    student: Tensor, teacher: Tensor, weights: Tensor | None = None, *, beta: float = 1.0
) -> Tensor:
    """(1/D) Σ of d²/2β where |d| < β and |d| - β/2 elsewhere, d = s - t (Girshick, 2015)."""
    values = functools.partial(_smooth_l1, beta=beta)
    return _loss(values, student, teacher, weights, additive=True)


def _cosine(
    s: Tensor, t: Tensor, w: Tensor | None, axes: tuple[int, ...], size: int, whole: Whole
) -> Tensor:
    s, t = counted(wide(s), w), counted(wide(t), w)
    products = [(a * b).sum(axes) for a, b in ((s, t), (s, s), (t, t))]
    dot, s_squares, t_squares = whole(torch.stack(products)).unbind()
    norms = _root(s_squares) * _root(t_squares)
    return 1 - dot / norms.clamp_min(1e-12)


@one_node
def cosine(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """1 - s·t / (‖s‖ ‖t‖), the mean over tokens (DistilBERT, Sanh et al., 2019).

    ``F.cosine_embedding_loss`` is not used: its value is wrong on a DTensor sharded along the
    width.
    """
    return _loss(_cosine, student, teacher, weights, additive=False)
