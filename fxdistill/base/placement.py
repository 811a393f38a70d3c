"""Tensors and their placements on a mesh."""

from collections.abc import Sequence
from typing import Any

import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from fxdistill.errors import MeshError


def placed(x: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """``x`` with these placements; a plain tensor is taken to be the same on all ranks."""
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return x.redistribute(mesh, placements)


def countable(placement: Placement) -> Placement:
    """``placement`` if it is a plain ``Shard``; else ``Replicate``.

    Only a plain ``Shard`` gives each rank a contiguous range of an axis: pending sums (``Partial``)
    and the strided shards that views create do not.
    """
    return placement if type(placement) is Shard else Replicate()


def everywhere(x: Tensor, like: DTensor) -> DTensor:
    """``x`` replicated on the mesh of ``like``; its gradient is summed over the ranks."""
    return placed(x, like.device_mesh, [Replicate()] * like.device_mesh.ndim)


def dense(x: DTensor) -> DTensor:
    """``x`` with a contiguous local tensor on every rank.

    After an uneven split the last local tensor may have gaps. Layers flatten their input, and
    DTensor does not check the strides of the local tensor.
    """
    part, placements = x.to_local().contiguous(), list(x.placements)
    return DTensor.from_local(
        part, x.device_mesh, placements, run_check=False, shape=x.shape, stride=x.stride()
    )


def whole(x: Tensor) -> Tensor:
    """The whole of ``x`` as a plain tensor, on every rank."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local_part(x: Tensor) -> Tensor:
    """The local tensor of a DTensor; a plain tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def mesh_of(*tensors: Tensor) -> DeviceMesh:
    """The mesh of all DTensors among ``tensors``; MeshError if they lie on different meshes."""
    meshes = [x.device_mesh for x in tensors if isinstance(x, DTensor)]
    if any(mesh != meshes[0] for mesh in meshes):
        raise MeshError(
            f"values on two meshes cannot be compared: {meshes[0]} and {meshes[1]}. Parallelize "
            "student and teacher on one DeviceMesh."
        )
    return meshes[0]


def summed(local: Tensor, mesh: DeviceMesh, dims: set[int]) -> Tensor:
    """The sum of ``local`` over the mesh dimensions ``dims``, on every rank."""
    if not dims:
        return local
    kinds = [Partial() if i in dims else Replicate() for i in range(mesh.ndim)]
    total = DTensor.from_local(local, mesh, kinds, run_check=False)
    return total.redistribute(mesh, [Replicate()] * mesh.ndim).to_local()


def chunk_of(mesh: DeviceMesh, dim: int, size: int) -> tuple[int, int]:
    """The offset of this rank's shard of an axis of ``size``, and the length of the largest shard.

    ``Shard`` cuts like ``torch.chunk``: the last shards may be shorter, or empty.
    """
    each = -(-size // mesh.size(dim))
    return min(size, each * mesh.get_local_rank(dim)), each


# torch 2.13 renames it.
_all_gather: Any = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor


def gather_over(x: Tensor, group: str) -> Tensor:
    """The rows of ``x`` of all ranks of ``group``, in their order; it has no gradient."""
    gathered: Tensor = funcol.wait_tensor(_all_gather(x.contiguous(), 0, group))
    return gathered


def sum_over(x: Tensor, groups: Sequence[str]) -> Tensor:
    """Σ x over the ranks of ``groups`` (names), on every rank; it has no gradient."""
    for group in groups:
        x = funcol.wait_tensor(funcol.all_reduce(x, "sum", group))  # type: ignore[arg-type]
    return x
