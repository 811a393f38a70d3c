"""Losses against labels."""

import torch
from torch import Tensor

from fxdistill.base.nodes import one_node
from fxdistill.base.tensors import is_placed, wide
from fxdistill.losses import sharded
from fxdistill.losses.reduce import IGNORE, counted, weighted_mean
from fxdistill.losses.shapes import require_grid


@one_node
def cross_entropy(
    student_logits: Tensor,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """-log p(label), Σ w·value / Σ w over the labels that are not -100.

    ``student_logits`` ``[..., V]``, ``labels`` and ``weights`` ``[...]`` are aligned already: no
    shift happens here. ``label_smoothing`` ε mixes in the mean over the vocabulary,
    (1-ε)·CE + ε·mean(-log p) (Szegedy et al., 2016); ``z_loss`` adds that multiple of lse² (PaLM,
    Chowdhery et al., 2022). Labels or weights of another shape raise ShapeError.
    """
    require_grid("labels", labels, student_logits)
    if weights is not None:
        require_grid("weights", weights, student_logits)
    if is_placed(student_logits):
        given = (student_logits, labels, weights, label_smoothing, z_loss)
        of_shards: Tensor = sharded.logits.label_loss(cross_entropy, *given)
        return of_shards
    labelled = labels != IGNORE
    w = labelled.float() if weights is None else weights * labelled
    z = counted(wide(student_logits), w)
    index = torch.where(labelled, labels, torch.zeros_like(labels))
    lse = z.logsumexp(-1)
    values = lse - z.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    if label_smoothing:
        values = (1 - label_smoothing) * values + label_smoothing * (lse - z.sum(-1) / z.shape[-1])
    if z_loss:
        values = values + z_loss * lse.square()
    return weighted_mean(values, w)
