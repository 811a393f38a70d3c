"""Scores of logits that are DTensors: sharded by vocabulary, by tokens, or replicated."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fxdistill.base.placement import chunk_of, mesh_of, placed
from fxdistill.base.tensors import wide
from fxdistill.losses.fused.chunk import ChunkSpec
from fxdistill.losses.fused.scores import Names, Sides, scored, sides_of
from fxdistill.losses.fused.sharded_score_heads import gathered
from fxdistill.losses.fused.sharded_scores import scored_on_shards
from fxdistill.losses.sharded.logits import tokens_of, vocabulary_axis, whole_sums


@torch.library.custom_op("fxdistill::sharded_scores", mutates_args=())
def score_operator(
    student: Tensor | None,
    teacher: Tensor | None,
    live: Tensor,
    tau: Tensor,
    names: str,
    spec: str,
    group: str,
    offset: int,
) -> Tensor:
    """The scores ``names`` ``[T, n]`` of logits ``[T, V / ranks]``; see ``vocab_scores``."""
    shape, asked = ChunkSpec.read(spec), tuple(names.split(","))
    sides = sides_of(Sides(student, teacher), live, tau, shape, offset)
    return scored_on_shards(sides, asked, shape.mix(tau), group)


@score_operator.register_fake
def _(*args: Any) -> Tensor:
    live, tau, names = args[2:5]
    found: Tensor = tau.new_empty(live.shape[0], len(names.split(",")))
    return found


def token_scores(
    student: Tensor | None,
    teacher: Tensor | None,
    names: Names,
    shape: ChunkSpec,
    temperature: Tensor | float,
    weights: Tensor | None,
) -> Tensor:
    """The scores ``[..., n]`` of DTensors, as a plain tensor that is the same on every rank."""
    given = [x for x in (student, teacher) if x is not None]
    mesh_of(*given)
    where = whole_sums(next(x for x in given if isinstance(x, DTensor)))
    local = [
        None if x is None else placed(x, where.device_mesh, where.placements).to_local()
        for x in (student, teacher)
    ]
    one = where.to_local()
    grid = one.shape[:-1]
    live = torch.ones(grid, dtype=torch.bool, device=one.device)
    if weights is not None:
        live = tokens_of(where, weights.detach()) != 0
    tau = torch.as_tensor(temperature, dtype=wide(one).dtype, device=one.device).reshape(())
    flat = Sides(*(None if x is None else wide(x).flatten(0, -2) for x in local))
    if (axis := vocabulary_axis(where)) is None:
        found = scored(sides_of(flat, live.flatten(), tau, shape), names, shape.mix(tau))
    else:
        mesh = where.device_mesh
        offset, _ = chunk_of(mesh, axis, where.shape[-1])
        if not one.shape[-1]:  # a rank without columns computes one that is not compared
            flat = Sides(*(None if x is None else x.new_zeros(x.shape[0], 1) for x in flat))
        group = mesh.get_group(axis).group_name
        what = (tau, ",".join(names), shape.text, group, offset)
        found = score_operator(*flat, live.flatten(), *what)
    return gathered(found.unflatten(0, grid), where.shape[:-1], where)
