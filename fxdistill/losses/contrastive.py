"""Losses of contrast: which of the teacher's samples is the student's own?"""

import torch
from torch import Tensor

from fxdistill.base.nodes import one_node
from fxdistill.errors import ShapeError
from fxdistill.losses.reduce import in_full_precision, normalized, weighted_mean
from fxdistill.losses.samples import both


@one_node
@in_full_precision
def info_nce(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None = None,
    *,
    temperature: float = 0.5,
    symmetric: bool = False,
    across_ranks: bool = True,
) -> Tensor:
    """-log softmax_j(ŝ_i·t̂_j/τ) at j = i, the mean over samples i (van den Oord et al., 2018).

    ŝ and t̂ are of length 1. ``symmetric=True`` takes the mean with the other direction, where each
    of the teacher's samples finds its student's. Values are reduced to samples ``[B, D]`` as
    in ``losses.relational``, and here their widths must agree; samples of weight 0 are candidates
    for nobody. With one sample the value is 0. ``across_ranks`` is that of ``losses.relational``.
    """
    s, t, w = both(student, teacher, weights)
    if s.shape != t.shape:
        raise ShapeError(
            f"info_nce compares samples of one width, not {s.shape[1]} and {t.shape[1]}: "
            "project='auto' maps the student's to the teacher's"
        )
    products = normalized(s, (-1,)) @ normalized(t, (-1,)).T / temperature
    loss = weighted_mean(_surprise(products, w), w)
    if symmetric:
        loss = (loss + weighted_mean(_surprise(products.T, w), w)) / 2
    return loss


def _surprise(products: Tensor, weights: Tensor | None) -> Tensor:
    """-log softmax of the diagonal, over the columns that count."""
    own = products.diagonal()
    if weights is not None:
        itself = torch.eye(len(products), dtype=torch.bool, device=products.device)
        products = torch.where((weights != 0)[None, :] | itself, products, -torch.inf)
    return products.logsumexp(-1) - own
