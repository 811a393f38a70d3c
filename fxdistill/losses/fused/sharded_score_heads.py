"""Scores of heads on a sharded vocabulary: ranks exchange a few numbers of a token, never a logit.

The forms are those of ``sharded_heads.py``.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from fxdistill.base.placement import chunk_of, placed
from fxdistill.losses.fused.call import HeadSide, Shard
from fxdistill.losses.fused.score_operator import ScoreCall, score_operator
from fxdistill.losses.fused.sharded_heads import ShardedHeads, local_side, sharded_heads_of


def vocab_scores(call: ScoreCall) -> Tensor:
    """The scores ``[T, n]`` of all tokens, the same on all ranks."""
    first, *others = call.given
    layout = sharded_heads_of(first, others[0] if others else None)
    form = _on_tokens if layout.gathers_weights else _on_columns
    return form(layout, call)


def _on_columns(layout: ShardedHeads, call: ScoreCall) -> Tensor:
    """Every rank scores all tokens by its columns."""
    mesh, axis = layout.mesh, layout.axis
    sizes = [side.weight.shape[0] for side in call.given]
    first, each = chunk_of(mesh, axis, sizes[0])
    rows = max(1, *(min(each, max(0, size - first)) for size in sizes))
    local = tuple(None if x is None else local_side(x, layout, rows) for x in call.sides)
    shard = Shard(mesh.get_group(axis).group_name, first, sizes[0])
    found: Tensor = score_operator(*replace(call, sides=local, shard=shard).arguments())
    return found


def _on_tokens(layout: ShardedHeads, call: ScoreCall) -> Tensor:
    """Every rank scores its own tokens with gathered weights; the scores are gathered."""
    mesh, hidden = layout.mesh, call.given[0].hidden
    assert isinstance(hidden, DTensor)
    tokens, everywhere = list(hidden.placements), [Replicate()] * mesh.ndim

    def local(side: HeadSide) -> HeadSide:
        h, *rest = side
        whole = [None if x is None else placed(x, mesh, everywhere).to_local() for x in rest]
        return HeadSide(placed(h, mesh, tokens).to_local(), *whole)  # type: ignore[arg-type]

    grid = hidden.shape[:-1]
    live = placed(call.live.unflatten(0, grid), mesh, tokens).to_local()
    sides = tuple(None if side is None else local(side) for side in call.sides)
    found: Tensor = score_operator(
        *replace(call, sides=sides, live=live.flatten()).flat().arguments()
    )
    return gathered(found.unflatten(0, live.shape), grid, hidden).flatten(0, -2)


def gathered(local: Tensor, grid: tuple[int, ...], like: DTensor) -> Tensor:
    """All scores ``[*grid, n]`` from those of the tokens that this rank has of ``like``."""
    shape = torch.Size((*grid, local.shape[-1]))
    stride = torch.empty(shape, device="meta").stride()
    placements = [Replicate() if p.is_shard(like.ndim - 1) else p for p in like.placements]
    whole = DTensor.from_local(
        local, like.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )
    return whole.full_tensor()
