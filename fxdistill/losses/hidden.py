"""Losses between hidden states.

Each takes ``student`` and ``teacher`` of one shape, and ``weights`` shaped like their leading axes
(``[B, L]`` for ``[B, L, D]``), or ``None`` where every value counts alike. The value of a token is
formed over its width D; the result is Σ w·value / Σ w, a scalar in float32 (float64 stays).
"""

import torch
from torch import Tensor

from fxdistill.losses.reduce import counted, weighted_mean, wide, width_axes, width_of
from fxdistill.nodes import one_node


def _distance(student: Tensor, teacher: Tensor, weights: Tensor | None) -> Tensor:
    return counted(wide(student) - wide(teacher), weights)


@one_node
def mse(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """(1/D) Σ (s - t)², the mean over tokens.

    Not ``F.mse_loss``: on a sharded DTensor its gradient is too large by the number of ranks.
    """
    axes = width_axes(student, weights)
    squares = _distance(student, teacher, weights).square().sum(axes)
    return weighted_mean(squares / width_of(student, axes), weights)


@one_node
def l2(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """‖s - t‖₂, unsquared, the mean over tokens (the activation loss of Fast-LLM).

    Its gradient has length 1 however near the two are, and is 0 where they are equal.
    """
    axes = width_axes(student, weights)
    norms = torch.linalg.vector_norm(_distance(student, teacher, weights), dim=axes)
    return weighted_mean(norms, weights)


@one_node
def l1(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """(1/D) Σ |s - t|, the mean over tokens."""
    axes = width_axes(student, weights)
    distances = _distance(student, teacher, weights).abs().sum(axes)
    return weighted_mean(distances / width_of(student, axes), weights)


@one_node
def smooth_l1(
    student: Tensor, teacher: Tensor, weights: Tensor | None = None, *, beta: float = 1.0
) -> Tensor:
    """(1/D) Σ of d²/2β where |d| < β and |d| - β/2 elsewhere, d = s - t (Girshick, 2015)."""
    axes = width_axes(student, weights)
    distance = _distance(student, teacher, weights).abs()
    near = distance.square() * (0.5 / beta)
    values = torch.where(distance < beta, near, distance - 0.5 * beta).sum(axes)
    return weighted_mean(values / width_of(student, axes), weights)


@one_node
def cosine(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """1 - s·t / (‖s‖ ‖t‖), the mean over tokens (DistilBERT, Sanh et al., 2019).

    Not ``F.cosine_embedding_loss``: on a DTensor sharded along the width its value is wrong.
    """
    axes = width_axes(student, weights)
    s, t = counted(wide(student), weights), counted(wide(teacher), weights)
    norms = torch.linalg.vector_norm(s, dim=axes) * torch.linalg.vector_norm(t, dim=axes)
    return weighted_mean(1 - (s * t).sum(axes) / norms.clamp_min(1e-12), weights)
