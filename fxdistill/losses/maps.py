"""Losses between maps ``[B, C, *places]`` that look at a whole sample: where its activations lie.

Tokens ``[B, L, D]`` are maps too: their places are the tokens, their channels the width.
``weights`` are ``[B]``, or those of the places, ``[B, *places]`` or ``[B, L]``; places of weight 0
do not count, and weights of another shape raise ShapeError. On a mesh both values are gathered.
"""

import torch
from torch import Tensor

from fxdistill.base.figures import shown
from fxdistill.base.nodes import one_node
from fxdistill.base.tensors import on_every_rank, wide
from fxdistill.errors import ShapeError
from fxdistill.losses.reduce import (
    channels_last,
    counted,
    in_range,
    is_map,
    normalized,
    spread,
    weighted_mean,
)
from fxdistill.losses.shapes import require_weights


def _places(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The value as ``[B, N, C]``, with 0 where nothing counts, and the weights ``[B, N]``."""
    x = on_every_rank(x)
    if x.ndim < 3:
        raise ShapeError(f"a value {shown(x.shape)} has no places: [B, C, *places] or [B, L, D]")
    if weights is not None:
        require_weights(weights, x)
    x = channels_last(x) if is_map(x, weights) else x
    if weights is not None and weights.ndim == 1:
        weights = spread(weights, tuple(x.shape[:-1]))
    leading = x.ndim - 1 if weights is None else weights.ndim
    if weights is not None:
        weights = weights.to(wide(x).dtype).flatten(1)
    x = wide(x).flatten(leading) if x.ndim > leading + 1 else wide(x)
    x = x.flatten(1, leading - 1)
    return counted(x, weights), weights


def _same_places(
    student: Tensor, teacher: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    s, w = _places(student, weights)
    t, _ = _places(teacher, weights)
    if s.shape[:2] != t.shape[:2]:
        raise ShapeError(
            f"the student's map is {shown(student.shape)} and the teacher's "
            f"{shown(teacher.shape)}: bring them to the same places, Match(..., "
            "reduce=(pattern, 'mean'))"
        )
    return s, t, w


@one_node
def attention_transfer(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean over places of (Â_S - Â_T)², Â = A/‖A‖₂ and A = Σ_c h_c² at each place of a sample.

    The source is Zagoruyko & Komodakis (2017). The norm is that of the counted places of a sample,
    the mean is over those of the batch. Numbers of channels may differ; other places raise
    ShapeError.
    """
    s, t, w = _same_places(student, teacher, weights)
    # No scale of a sample changes Â, and small ones would be squared to 0.
    s, t = (normalized(in_range(x, (1, 2)).square().sum(-1), (-1,)) for x in (s, t))
    return weighted_mean((s - t).square(), w)


@one_node
def fpn(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean over places and channels of (a ⊙ (h_S - h_T))², for one level of a pyramid.

    a = mean_c|h_T| over its maximum over the places of the sample: the teacher's attention, which
    has no gradient. This is in the manner of Zhang & Ma (2021), who take a softmax. A pyramid is
    one match a level. Raises ShapeError where shapes differ.
    """
    if student.shape != teacher.shape:
        raise ShapeError(
            f"the student's map is {shown(student.shape)} and the teacher's "
            f"{shown(teacher.shape)}: Match(..., project='auto') maps the channels, "
            "reduce= the places"
        )
    s, t, w = _same_places(student, teacher, weights)
    strength = t.detach().abs().mean(-1)
    most = strength.amax(-1, keepdim=True)
    strength = strength / torch.where(most == 0, 1, most)
    return weighted_mean((strength.unsqueeze(-1) * (s - t)).square().mean(-1), w)
