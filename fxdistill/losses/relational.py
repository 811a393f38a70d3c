"""Losses of relations: how the samples of a batch lie to each other, in student and teacher.

``student`` and ``teacher`` are samples ``[B, D]``, tokens ``[B, L, D]`` or maps
``[B, C, *places]``; the last two are reduced to samples by the mean over what counts
(``losses.samples``). Their widths may differ, and no projection is needed. ``weights`` are
``[B]``, or those of tokens or places, or ``None``. A pair of samples i, j weighs w_i·w_j in every
sum over pairs, the norms and means of the formulas included. Where nothing counts, the value is 0
with zero gradients.

Under data parallel these losses compare the samples of all ranks, with the gradient of one process
on the whole batch; ``across_ranks=False`` takes the mean of the ranks' own losses. Called alone, a
loss sees what it is given, and ``across_ranks`` changes nothing.
"""

from typing import Literal

import torch
from torch import Tensor

from fxdistill.base.nodes import one_node
from fxdistill.errors import OptionError
from fxdistill.losses.angles import angle_loss
from fxdistill.losses.reduce import huber, in_full_precision, normalized, root, weighted_mean
from fxdistill.losses.samples import both

EPSILON = 1e-8


def _pairs(x: Tensor, weights: Tensor | None) -> Tensor:
    """The weight of each pair of samples, ``[B, B]``."""
    w = x.new_ones(x.shape[0]) if weights is None else weights
    return w[:, None] * w[None, :]


@one_node
@in_full_precision
def gram(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None = None,
    *,
    across_ranks: bool = True,
) -> Tensor:
    """The mean of (Ĝ_S - Ĝ_T)² over all i, j, with G = h hᵀ ``[B, B]`` and Ĝ = G/(‖G‖_F + 1e-8).

    These are correlations between samples (correlation congruence, Peng et al., 2019, with a linear
    kernel).
    """
    s, t, w = both(student, teacher, weights)
    pairs = _pairs(s, w)
    difference = _unit_gram(s, pairs) - _unit_gram(t, pairs)
    return weighted_mean(difference.square(), pairs)


def _unit_gram(x: Tensor, pairs: Tensor) -> Tensor:
    products = x @ x.T
    return products / (root((pairs * products.square()).sum()) + EPSILON)


@one_node
@in_full_precision
def distance_wise(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None = None,
    *,
    normalize: Literal["mean", "max"] = "mean",
    across_ranks: bool = True,
) -> Tensor:
    """The mean over all i, j of Huber(d_S - d_T), d_ij = ‖h_i - h_j‖ over its mean for i ≠ j.

    The source is Park et al. (RKD, 2019). ``normalize="max"`` divides by the largest distance
    instead. Huber is d²/2 up to 1. One sample has no distance: the value is 0, with zero gradient.
    """
    if normalize not in ("mean", "max"):
        raise OptionError(f"normalize={normalize!r}: 'mean' or 'max'")
    s, t, w = both(student, teacher, weights)
    pairs = _pairs(s, w)
    apart = pairs * (1 - torch.eye(s.shape[0], dtype=pairs.dtype, device=pairs.device))
    difference = _distances(s, apart, normalize) - _distances(t, apart, normalize)
    return weighted_mean(huber(difference), pairs)


def _distances(x: Tensor, apart: Tensor, normalize: str) -> Tensor:
    """The distances of all samples in units of their mean or their maximum over what counts."""
    # The other mode forms |a|² + |b|² - 2ab, which loses the distance of samples close together.
    far = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    if normalize == "mean":
        unit = weighted_mean(far, apart)
    else:
        unit = torch.where(apart != 0, far, 0).amax() if x.shape[0] else far.sum()
    return far / torch.where(unit == 0, 1, unit)


@one_node
@in_full_precision
def angle_wise(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None = None,
    *,
    across_ranks: bool = True,
) -> Tensor:
    """The mean of Huber(cos_S - cos_T) over all ordered triples of different samples i, j, k.

    cos is that of the angle at j between i and k (RKD, Park et al., 2019). A triple weighs
    w_i·w_j·w_k. Below three samples the value is 0, with zero gradient; two samples in one place
    have no angle, and their cosine counts as 0. The time is B³·D. The memory is B²: it is one
    operator, which takes some j at a time and forms its gradient in the forward, so it has no
    second derivative.
    """
    s, t, w = both(student, teacher, weights)
    return angle_loss(s, t, s.new_ones(s.shape[0]) if w is None else w)


@one_node
@in_full_precision
def similarity_preserving(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None = None,
    *,
    form: Literal["rows", "cosine"] = "rows",
    across_ranks: bool = True,
) -> Tensor:
    """The mean over all i, j of (Ĝ_S - Ĝ_T)², with the rows of G = h hᵀ normalised to length 1.

    The source is Tung & Mori (2019): ‖Ĝ_S - Ĝ_T‖² / B². With ``form="cosine"``, G are the cosines
    of all pairs instead.
    """
    if form not in ("rows", "cosine"):
        raise OptionError(f"form={form!r}: 'rows' or 'cosine'")
    s, t, w = both(student, teacher, weights)
    pairs = _pairs(s, w)
    similar = _rows if form == "rows" else _cosines
    return weighted_mean((similar(s, w) - similar(t, w)).square(), pairs)


def _rows(x: Tensor, weights: Tensor | None) -> Tensor:
    products = x @ x.T
    squares = products.square() if weights is None else products.square() * weights
    norm = root(squares.sum(-1, keepdim=True))
    return products / torch.where(norm == 0, 1, norm)


def _cosines(x: Tensor, weights: Tensor | None) -> Tensor:
    unit = normalized(x, (-1,))
    return unit @ unit.T


BETWEEN_SAMPLES = (gram, distance_wise, angle_wise, similarity_preserving)
