"""Losses between hidden states, place by place.

Each takes ``student`` and ``teacher`` of one shape, and ``weights`` shaped like their leading axes
(``[B, L]`` for ``[B, L, D]``), or ``None`` to count all tokens alike. The value of a token is
formed over its width D; the result is Σ w·value / Σ w, a scalar in float32 (float64 stays). Weights
of the value's own shape say that each number is a token, of width 1. Other shapes raise ShapeError.

The width of a map ``[B, C, *places]``, of 4 axes or more, is its channels C. A map is averaged over
its places and then over samples, unless ``weights`` are ``[B, *places]``: then over these.

DTensors give the same value and gradients as one device; see ``losses.sharded.hidden``.
"""

import functools

import torch
from torch import Tensor

from fxdistill.base.nodes import one_node
from fxdistill.base.tensors import is_placed, wide
from fxdistill.losses import sharded
from fxdistill.losses.reduce import (
    Values,
    Whole,
    Width,
    counted,
    in_range,
    laid_out,
    root,
    weighted_mean,
    width_axes,
    width_of,
)
from fxdistill.losses.shapes import differ, require_alike, require_weights


def placewise(
    values: Values, student: Tensor, teacher: Tensor, weights: Tensor | None, width: Width
) -> Tensor:
    """Σ w·value / Σ w; ``width`` says how a value follows from its width.

    ``values`` sees one token at a time: on a mesh it is given this rank's tokens only. A loss that
    compares tokens or samples with one another must gather both sides itself.
    """
    require_alike(student, teacher)
    if weights is not None and not differ(weights.shape, student.shape):
        student, teacher = student.unsqueeze(-1), teacher.unsqueeze(-1)
    elif weights is not None:
        require_weights(weights, student)
    vectors = width != "sum"
    student, teacher, weights = laid_out(student, teacher, weights, vectors=vectors)
    axes = width_axes(student, weights, vectors=vectors)
    if is_placed(student) or is_placed(teacher):
        of_shards: Tensor = sharded.hidden.loss(values, student, teacher, weights, axes, width)
        return of_shards
    size = width_of(student, axes)
    return weighted_mean(values(student, teacher, weights, axes, size, _all_here), weights)


def _all_here(sums: Tensor) -> Tensor:
    return sums


def _distance(student: Tensor, teacher: Tensor, weights: Tensor | None) -> Tensor:
    return counted(wide(student) - wide(teacher), weights)


def _mse(
    s: Tensor, t: Tensor, w: Tensor | None, axes: tuple[int, ...], size: int, whole: Whole
) -> Tensor:
    return _distance(s, t, w).square().sum(axes) / size


@one_node
def mse(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """(1/D) Σ (s - t)², the mean over tokens: up to a factor the hint of Romero et al. (2015).

    ``F.mse_loss`` is not used: on a sharded DTensor its gradient is too large by the number of
    ranks.
    """
    return placewise(_mse, student, teacher, weights, "sum")


def _l2(
    s: Tensor, t: Tensor, w: Tensor | None, axes: tuple[int, ...], size: int, whole: Whole
) -> Tensor:
    return root(whole(_distance(s, t, w).square().sum(axes)))


@one_node
def l2(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """‖s - t‖₂, unsquared, the mean over tokens (the activation loss of Fast-LLM).

    Its gradient by s has length 1 however close s and t are, and is 0 where they are equal.
    """
    return placewise(_l2, student, teacher, weights, "sums")


def _l1(
    s: Tensor, t: Tensor, w: Tensor | None, axes: tuple[int, ...], size: int, whole: Whole
) -> Tensor:
    return _distance(s, t, w).abs().sum(axes) / size


@one_node
def l1(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """(1/D) Σ |s - t|, the mean over tokens (DistilHuBERT, Chang et al., 2022, beside an angle)."""
    return placewise(_l1, student, teacher, weights, "sum")


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
    return placewise(values, student, teacher, weights, "sum")


def _cosine(
    s: Tensor, t: Tensor, w: Tensor | None, axes: tuple[int, ...], size: int, whole: Whole
) -> Tensor:
    s, t = counted(wide(s), w), counted(wide(t), w)
    products = [(a * b).sum(axes) for a, b in ((s, t), (s, s), (t, t))]
    dot, s_squares, t_squares = whole(torch.stack(products)).unbind()
    norms = root(s_squares) * root(t_squares)
    return 1 - dot / norms.clamp_min(1e-12)


@one_node
def cosine(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """1 - s·t / (‖s‖ ‖t‖), the mean over tokens (DistilBERT, Sanh et al., 2019).

    ``F.cosine_embedding_loss`` is not used: its value is wrong on a DTensor sharded along the
    width.
    """
    return placewise(_cosine, student, teacher, weights, "sums")


def _fitnet(
    s: Tensor, t: Tensor, w: Tensor | None, axes: tuple[int, ...], size: int, whole: Whole
) -> Tensor:
    s, t = counted(wide(s), w), counted(wide(t), w)
    if whole is _all_here:
        s, t = in_range(s, axes), in_range(t, axes)
    gap = s - t
    products = [(a * b).sum(axes) for a, b in ((gap, gap), (gap, s + t), (s, s), (t, t))]
    apart, along, s_squares, t_squares = whole(torch.stack(products)).unbind()
    zero = (s_squares == 0) | (t_squares == 0)
    s_norm, t_norm = (torch.where(zero, 1, x).sqrt() for x in (s_squares, t_squares))
    shorter = along / (s_norm + t_norm)  # |s| - |t|, exact where both are nearly equal
    if whole is _all_here:
        first = (1 / s_norm, shorter / (s_norm * t_norm))
        own, others = (x.reshape(*x.shape, *(1,) * len(axes)) for x in first)
        value = (gap * own - t * others).square().sum(axes)
    else:
        # Ranks share the width, and add these sums up once: |ŝ - t̂|² = (|s - t|² - (|s| - |t|)²) /
        # |s||t|, which loses digits where the scales of s and t differ by far.
        value = (apart - shorter.square()) / (s_norm * t_norm)
    of_zeros = (s_squares != 0).to(value.dtype) + (t_squares != 0)
    return torch.where(zero, of_zeros, value) / size


@one_node
def fitnet(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """(1/D) Σ (s/‖s‖ - t/‖t‖)², the mean over tokens: FitNets on normalised features.

    The hint loss of Romero et al. (2015), without the scales of the two networks: a vector of zeros
    stays zero. ``project="auto"`` maps a student of another width.
    """
    return placewise(_fitnet, student, teacher, weights, "sums")
