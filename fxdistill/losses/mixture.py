"""One target from several teachers: logits whose probabilities are the mean of theirs.

A divergence takes logits. So the mean of probabilities is handed to it as logits, whose softmax at
the same temperature it is; then every divergence, every score of importance and every loss of the
user's own compares with it as with one teacher.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fxdistill.base.figures import shown
from fxdistill.base.nodes import one_node
from fxdistill.base.tensors import wide
from fxdistill.errors import ShapeError
from fxdistill.losses.shapes import differ, require_logits

Pooled = Literal["probabilities", "classes", "logits"]


@one_node
def mean_of_teachers(
    logits: Sequence[Tensor],
    weights: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    pooled: Pooled = "probabilities",
) -> Tensor:
    """Logits of the mean of teachers, Σ_k w_k / Σw · p_k (Hinton et al., 2015, section 2).

    Args:
        logits: The logits of each teacher, of one shape ``[..., V]``.
        weights: ``[K]``, at least 0; only their ratios count.
        temperature: The τ at which probabilities are averaged.
        pooled: What is averaged: ``"probabilities"``, softmax(z_k/τ); ``"classes"``, the
            probability σ(z_k/τ) of each class by itself; ``"logits"``, the logits, without a τ.

    Returns:
        ``[..., V]`` in float32 (float64 stays). For ``"probabilities"`` it is
        τ·log Σ_k w_k softmax(z_k/τ); an entry that all teachers rule out is -inf.

    Raises ShapeError where teachers differ in their predictions, or have not one weight each, and
    VocabularyError where they differ in their vocabularies.
    """
    if differ(weights.shape, (len(logits),)):
        raise ShapeError(f"weights {shown(weights.shape)} of {len(logits)} teachers: one for each")
    for other in logits[1:]:
        require_logits(logits[0], other)
    share = (weights / weights.sum()).unbind()
    if pooled == "logits":
        parts = [w.to(wide(z).dtype) * wide(z) for w, z in zip(share, logits, strict=True)]
        return torch.stack(parts).sum(0)
    scaled = [wide(z) / temperature for z in logits]
    if pooled == "classes":
        yes, no = (_log_mean([logsigmoid(sign * z) for z in scaled], share) for sign in (1, -1))
        return (yes - no) * temperature
    return _log_mean([z.log_softmax(-1) for z in scaled], share) * temperature


def _log_mean(logs: Sequence[Tensor], share: Sequence[Tensor]) -> Tensor:
    """Log Σ_k w_k exp(l_k), without leaving logarithms."""
    total = logs[0] + share[0].log().to(logs[0].dtype)
    for log, w in zip(logs[1:], share[1:], strict=True):
        total = _log_sum(total, log + w.log().to(log.dtype))
    return total


def _log_sum(a: Tensor, b: Tensor) -> Tensor:
    """Log (exp(a) + exp(b)), whose gradient is 0, not NaN, where both are -inf.

    So it is for teachers without weight that learn, of whom there may be two.
    """
    none = torch.maximum(a, b) == -torch.inf
    a_, b_ = a.masked_fill(none, 0.0), b.masked_fill(none, 0.0)
    return torch.logaddexp(a_, b_).masked_fill(none, -torch.inf)
