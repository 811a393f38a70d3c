"""Losses against labels."""

import torch
from torch import Tensor

from fxdistill.losses.reduce import counted, is_placed, weighted_mean, wide
from fxdistill.nodes import one_node

IGNORE = -100


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

    ``student_logits`` ``[..., V]`` and ``labels`` ``[...]`` are aligned already (no shift happens
    here). ``label_smoothing`` ε mixes in the mean over the vocabulary, (1-ε)·CE + ε·mean(-log p)
    (Szegedy et al., 2016); ``z_loss`` adds that multiple of lse² (PaLM, Chowdhery et al., 2022).
    """
    if is_placed(student_logits):
        # What imports torch.distributed is imported where it is used.
        from fxdistill.parallel import logits

        options = (label_smoothing, z_loss)
        return logits.cross_entropy(cross_entropy, student_logits, labels, weights, *options)
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
