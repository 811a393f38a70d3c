"""The body of a chunk on a shard of the vocabulary, with its collectives.

Private to torch and used here only: ``_resolve_process_group``, which finds a group by its name (an
operator takes no group). If it moves, the sharded loss fails in the first call.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from fxdistill.base.nodes import own_code
from fxdistill.losses.fused.chunk import Chunk, ChunkSpec
from fxdistill.losses.fused.shard import ColumnRange, merged, statistics, sums, terms, write_slopes
from fxdistill.losses.fused.sizes import sizes_on


@functools.cache
def _part(fn: Callable[..., Tensor], shape: ChunkSpec, mine: ColumnRange, compiled: bool) -> Any:
    """One of the three parts of a chunk (see ``shard.py``); compiled if ``compiled``."""

    def part(chunk: Chunk, *extra: Tensor | None) -> Tensor:
        return fn(chunk, *extra, shape, mine)

    return torch.compile(own_code(part), fullgraph=True, dynamic=False) if compiled else part


def group_of(name: str) -> dist.ProcessGroup:
    """The process group of this name."""
    group: dist.ProcessGroup = _resolve_process_group(name)  # type: ignore[arg-type]
    return group


class ShardedBody:
    """``chunk.chunk_terms`` for the columns ``mine``; ``group`` names a process group."""

    def __init__(
        self, shape: ChunkSpec, mine: ColumnRange, group: str, slopes: bool, compiled: bool
    ) -> None:
        self.shape, self.mine, self.slopes, self.compiled = shape, mine, slopes, compiled
        self.group = group_of(group)

    def __call__(self, chunk: Chunk) -> Tensor:
        """The terms, the same on every rank; with ``slopes``, gradients overwrite the logits."""
        own = self._rows(statistics, chunk)
        gathered = own.new_empty(self.group.size(), *own.shape)
        dist.all_gather_into_tensor(gathered.flatten(0, 1), own, group=self.group)
        whole = merged(gathered)
        inner = None
        if chunk.teacher is not None and self.shape.divergences:
            inner = self._rows(sums, chunk, whole)
            dist.all_reduce(inner, group=self.group)
        if self.slopes:
            self._rows(write_slopes, chunk, whole, inner)
        return terms(chunk, whole, inner, self.shape, self.mine)

    def _rows(self, fn: Callable[..., Tensor], chunk: Chunk, *extra: Tensor | None) -> Tensor:
        """Apply ``fn`` to a few tokens of the chunk at a time (see ``operator.py``)."""
        part = _part(fn, self.shape, self.mine, self.compiled)
        count, size = chunk.student.shape[0], sizes_on(chunk.student.device).rows
        found = []
        for i in range(0, count, size):
            some = [None if x is None else x[i : i + size] for x in extra]
            found.append(part(chunk.rows(i, i + size), *some))
        return torch.cat(found)
