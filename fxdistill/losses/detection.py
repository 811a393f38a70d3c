"""Losses of detectors: classes and boxes of anchors ``[B, N, ...]``, of which some may count.

``weights`` ``[B, N]`` say which anchors count: ``Match(..., weights="foreground")``.
"""

import functools

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from fxdistill.base.figures import shown
from fxdistill.base.nodes import one_node
from fxdistill.base.tensors import wide
from fxdistill.errors import ShapeError
from fxdistill.losses.hidden import placewise, smooth_l1
from fxdistill.losses.reduce import Whole, counted


def _classification(
    s: Tensor,
    t: Tensor,
    w: Tensor | None,
    axes: tuple[int, ...],
    size: int,
    whole: Whole,
    *,
    temperature: float,
) -> Tensor:
    s, t = (_finite(counted(wide(x), w)) / temperature for x in (s, t))
    each = binary_cross_entropy_with_logits(s, torch.sigmoid(t), reduction="none")
    return temperature**2 * each.sum(axes) / size


def _finite(logits: Tensor) -> Tensor:
    """A class that a model rules out, with the logit -∞, has one of which σ is 0 all the same."""
    return torch.where(logits == -torch.inf, -1e4, logits)


@one_node
def detection_classification(
    student: Tensor, teacher: Tensor, weights: Tensor | None = None, *, temperature: float = 2.0
) -> Tensor:
    """τ² BCE(σ(s/τ), σ(t/τ)), the mean over anchors and classes (Yang et al., 2023).

    ``student`` and ``teacher`` are logits ``[B, N, C]``, and the loss is formed from them, so that
    it stays finite where a probability is rounded to 0 or 1. It is the entropy of the teacher plus
    a divergence (sigmoid_kl), and so not 0 where both agree.
    """
    values = functools.partial(_classification, temperature=temperature)
    return placewise(values, student, teacher, weights, "sum")


@one_node
def detection_box(
    student: Tensor, teacher: Tensor, weights: Tensor | None = None, *, beta: float = 1.0
) -> Tensor:
    """The smooth L1 loss of boxes ``[B, N, 4]``, the mean over counted anchors and coordinates.

    The source is Girshick (Fast R-CNN, 2015). Raises ShapeError where the last axis is not 4.
    """
    if tuple(student.shape[-1:]) != (4,):
        raise ShapeError(f"boxes are [B, N, 4], not {shown(student.shape)}")
    loss: Tensor = smooth_l1(student, teacher, weights, beta=beta)
    return loss
