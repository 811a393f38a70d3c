"""One chunk of tokens on one shard of the vocabulary: ``chunk.py`` in three parts.

Between the parts, ranks exchange statistics of each token, a few numbers, and never its logits.

1. ``statistics``: maxima and sums of exponentials on this shard. ``merged`` makes
   log-sum-exps of those of all ranks.
2. ``sums``: the divergence's sums over this shard's columns, which are added up over ranks.
3. ``write_slopes``: the gradient by this shard's logits.

Columns from ``shape.columns`` on are not compared. Columns from the vocabulary's size on do not
exist; a rank without columns has one of these.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxdistill.losses.fused.chunk import (
    Chunk,
    ChunkSpec,
    shared,
    through_head,
    write_gradient,
)
from fxdistill.losses.fused.formulas import Compared

LOWEST = -1e30  # instead of -inf, because -inf - -inf is NaN


@dataclass(frozen=True)
class ColumnRange:
    """The columns of a shard: from ``offset`` on, in a student's vocabulary of ``size``."""

    offset: int
    size: int


def _columns(x: Tensor, mine: ColumnRange) -> Tensor:
    return torch.arange(x.shape[-1], device=x.device) + mine.offset


def _student(c: Chunk, shape: ChunkSpec) -> tuple[Tensor, Tensor | None]:
    z, slope = through_head(c.student, shape.scales[0], shape.softcaps[0])
    return torch.where(c.live, z, 0.0), slope


def _logits(c: Chunk, z: Tensor, shape: ChunkSpec, mine: ColumnRange) -> tuple[Tensor, Tensor]:
    """The logits of both models over τ, -inf in columns that are not compared."""
    assert c.teacher is not None
    y, _ = through_head(c.teacher, shape.scales[1], shape.softcaps[1])
    y = torch.where(c.live, y, 0.0)
    inside = _columns(z, mine) < shape.columns
    tau = c.settings[2]
    return torch.where(inside, z / tau, -torch.inf), torch.where(inside, y / tau, -torch.inf)


def _compared(c: Chunk, z: Tensor, whole: Tensor, shape: ChunkSpec, mine: ColumnRange) -> Compared:
    s, t = _logits(c, z, shape, mine)
    reads_logs = shape.mix(c.settings[2]).reads_logs
    return Compared((s - whole[:, 0:1], t - whole[:, 1:2]) if reads_logs else None, (s, t))


def partial_lse(x: Tensor) -> list[Tensor]:
    """The maximum of each row, and the sum of exponentials below it."""
    most = x.amax(-1).clamp_min(LOWEST)
    return [most, (x - most[:, None]).exp().sum(-1)]


def statistics(c: Chunk, shape: ChunkSpec, mine: ColumnRange) -> Tensor:
    """``[c, 8]``: maximum and sum for s, t and z; the label's logit; the sum of z."""
    z, _ = _student(c, shape)
    exists = _columns(z, mine) < mine.size
    nothing = torch.zeros_like(c.logit_share)
    found = [nothing] * 4
    if c.teacher is not None and shape.divergences:
        s, t = _logits(c, z, shape, mine)
        found = [*partial_lse(s), *partial_lse(t)]
    picked = nothing
    if c.labels is not None and shape.labelled:
        index = c.labels - mine.offset
        own = (index >= 0) & (index < z.shape[-1])
        index = index.clamp(0, z.shape[-1] - 1)
        picked = torch.where(own, z.gather(-1, index[:, None]).squeeze(-1), 0.0)
    of_labels = partial_lse(torch.where(exists, z, -torch.inf))
    return torch.stack([*found, *of_labels, picked, torch.where(exists, z, 0.0).sum(-1)], -1)


def merged(gathered: Tensor) -> Tensor:
    """``[ranks, c, 8]`` → ``[c, 5]``: log-sum-exp of s, t and z; label's logit; sum of z."""
    most = gathered[..., 0:6:2].amax(0)
    sums = (gathered[..., 1:6:2] * (gathered[..., 0:6:2] - most).exp()).sum(0)
    return torch.cat([most + sums.log(), gathered[..., 6:].sum(0)], -1)


def sums(c: Chunk, whole: Tensor, shape: ChunkSpec, mine: ColumnRange) -> Tensor:
    """``[c, 1 + n]``: the mix of n divergences on these columns, and the sums for their slopes."""
    z, _ = _student(c, shape)
    return torch.stack(shape.mix(c.settings[2]).sums(_compared(c, z, whole, shape, mine)), -1)


def write_slopes(
    c: Chunk, whole: Tensor, inner: Tensor | None, shape: ChunkSpec, mine: ColumnRange
) -> Tensor:
    """Overwrite the student's logits with the total's gradient; return an empty tensor."""
    logit_weight, label_weight, tau = c.settings.unbind()
    z, slope = _student(c, shape)
    gradient = torch.zeros_like(z)
    if inner is not None:
        x = _compared(c, z, whole, shape, mine)
        by_s = shape.mix(tau).slope(x, inner[:, 1:].unbind(-1))
        by_s = torch.where(_columns(z, mine) < shape.columns, by_s, 0.0)
        gradient = (logit_weight * tau * c.logit_share)[:, None] * by_s
    if c.labels is not None and shape.labelled:
        lse, epsilon = whole[:, 2:3], shape.label_smoothing
        exists = _columns(z, mine) < mine.size
        hit = _columns(z, mine) == c.labels[:, None]
        by_z = (z - lse).exp() * (1 + 2 * shape.z_loss * lse)
        by_z = by_z - torch.where(hit, 1 - epsilon, 0.0) - epsilon / mine.size
        by_z = torch.where(exists, by_z, 0.0)
        gradient = gradient + (label_weight * c.label_share)[:, None] * by_z
    write_gradient(c, gradient, slope)
    return c.settings.new_empty(0)


def terms(
    c: Chunk, whole: Tensor, inner: Tensor | None, shape: ChunkSpec, mine: ColumnRange
) -> Tensor:
    """What each token adds to both terms, ``[2, c]``, the same on every rank."""
    found = [torch.zeros_like(c.logit_share), torch.zeros_like(c.logit_share)]
    if inner is not None:
        found[0] = c.settings[2].square() * shared(inner[:, 0], c.logit_share)
    if c.labels is not None and shape.labelled:
        lse, picked, total = whole[:, 2:].unbind(-1)
        epsilon = shape.label_smoothing
        value = lse - (1 - epsilon) * picked
        if epsilon:  # one column at -inf makes the sum -inf, and 0 times that is NaN
            value = value - epsilon * total / mine.size
        if shape.z_loss:
            value = value + shape.z_loss * lse.square()
        found[1] = shared(value, c.label_share)
    return torch.stack(found)
