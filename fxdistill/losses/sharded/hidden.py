"""Losses between hidden states that are DTensors: the placements tell what ranks exchange.

- Tokens sharded, by batch or by sequence, evenly or not: the total is summed over ranks.
- Width sharded: the same, if values are sums over the width (mse, l1, smooth_l1); else the sums of
  each token as well (one number for l2, three for cosine, four for fitnet).
- Pending sums (Partial): they are reduced first, and scattered over the tokens.
- Replicated: nothing.

The teacher's value is redistributed to the student's placement. The result is a plain scalar, the
same on every rank. In the backward each rank forms the gradient of its local values, and exchanges
nothing.
"""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from fxdistill.base.placement import countable, mesh_of, placed, summed, whole
from fxdistill.base.tensors import wide
from fxdistill.losses.reduce import Values, Width, width_of


def loss(
    values: Values,
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None,
    axes: tuple[int, ...],
    width: Width,
) -> Tensor:
    """Σ w·value / Σ w over all tokens; at least one of student and teacher is a DTensor.

    ``axes`` are those of a value's width.
    """
    mesh = mesh_of(student, teacher)
    where = _where(student, teacher, mesh, axes[0])
    s, t = (placed(x, mesh, where).to_local() for x in (student, teacher))
    share = _share(student, weights, axes[0], mesh, where, s)
    wide_dims = {i for i, p in enumerate(where) if _in(p, axes)}

    def of_all_ranks(sums: Tensor) -> Tensor:
        return summed(sums, mesh, wide_dims)

    counted = None if weights is None else share
    each = values(s, t, counted, axes, width_of(student, axes), of_all_ranks)
    own = torch.where(share != 0, each * share, 0).sum()
    sharded = {i for i, p in enumerate(where) if p.is_shard()}
    return summed(own, mesh, sharded if width == "sum" else sharded - wide_dims)


def _in(placement: Placement, axes: tuple[int, ...]) -> bool:
    return any(placement.is_shard(axis) for axis in axes)


def _where(student: Tensor, teacher: Tensor, mesh: DeviceMesh, leading: int) -> list[Placement]:
    """The placements in which the two are compared: the student's, without pending sums."""
    kinds = [
        list(x.placements) if isinstance(x, DTensor) else [Replicate()] * mesh.ndim
        for x in (student, teacher)
    ]
    found: list[Placement] = []
    for dim, (s, t) in enumerate(zip(*kinds, strict=True)):
        if s.is_partial():
            # Scatter as the teacher is, else over the tokens: half the bytes of an all-reduce.
            taken = [*found, *kinds[0][dim + 1 :]]
            free = [i for i in range(leading) if Shard(i) not in taken]
            s = t if t.is_shard() and t not in taken else _scattered(student, free, mesh.size(dim))
        found.append(countable(s))
    return found


def _scattered(x: Tensor, axes: list[int], ranks: int) -> Placement:
    """``Shard`` of the longest of ``axes``, if every rank gets a part; else ``Replicate``."""
    longest = None
    for axis in axes:
        if x.shape[axis] >= ranks and (longest is None or x.shape[axis] > x.shape[longest]):
            longest = axis
    return Replicate() if longest is None else Shard(longest)


def _share(
    student: Tensor,
    weights: Tensor | None,
    leading: int,
    mesh: DeviceMesh,
    where: list[Placement],
    local: Tensor,
) -> Tensor:
    """The shares w / Σw of the local tokens, with Σw over all tokens."""
    if weights is None:
        count = student.shape[:leading].numel()
        return wide(local).new_full(local.shape[:leading], 1.0 / count)
    weights = weights.to(wide(local).dtype)
    total = whole(weights.sum())
    of_width = tuple(range(weights.ndim, student.ndim))
    of_tokens = [Replicate() if _in(p, of_width) else p for p in where]
    mine = placed(weights, mesh, of_tokens).to_local()
    return mine / torch.where(total == 0, torch.ones_like(total), total)
