"""The scores of a chunk on a shard of the vocabulary, with its collectives."""

import torch.distributed as dist
from torch import Tensor

from fxdistill.losses.fused.chunk import ChunkSpec
from fxdistill.losses.fused.formulas import Mix
from fxdistill.losses.fused.scores import (
    Names,
    Sides,
    finished,
    merged,
    sides_of,
    statistics,
    sums,
)
from fxdistill.losses.fused.sharded_body import group_of


class ShardedScores:
    """The body of a chunk for the columns from ``offset`` on; ``group`` names a process group."""

    def __init__(self, names: Names, shape: ChunkSpec, group: str, offset: int) -> None:
        self.names, self.shape, self.group, self.offset = names, shape, group, offset

    def __call__(self, raw: Sides, live: Tensor, tau: Tensor) -> Tensor:
        """The scores, the same on every rank."""
        sides = sides_of(raw, live, tau, self.shape, self.offset)
        return scored_on_shards(sides, self.names, self.shape.mix(tau), self.group)


def scored_on_shards(sides: Sides, names: Names, mix: Mix, group: str) -> Tensor:
    """``scores.scored`` of tokens whose columns lie on the ranks of ``group``."""
    ranks = group_of(group)
    own = statistics(sides, names)
    gathered = own.new_empty(ranks.size(), *own.shape)
    dist.all_gather_into_tensor(gathered.flatten(0, 1), own, group=ranks)
    whole = merged(gathered)
    total = sums(sides, whole, names, mix)
    dist.all_reduce(total, group=ranks)
    return finished(total, whole, names, mix)
