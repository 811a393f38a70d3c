"""The DTensor whose local tensor a parallel style has returned."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from fxdistill.base.placement import chunk_of
from fxdistill.errors import TapError


def behind(before: DTensor, after: Tensor) -> Callable[[Tensor], DTensor]:
    """Return the function that turns ``after`` back into the DTensor that it came from.

    A parallel style redistributed ``before`` and returned its local tensor ``after``. The shape of
    ``after`` tells its placement: the whole value, or this rank's shard of one axis. TapError if it
    is neither, or a shard on a mesh of several dimensions.
    """
    mesh = before.device_mesh
    placements: list[Placement] = [Replicate()] * mesh.ndim
    if after.shape != before.shape:
        axis = _sharded_axis(before, after)
        if axis is None or mesh.ndim > 1:
            raise TapError(
                f"a parallel style makes a plain tensor {list(after.shape)} of a DTensor "
                f"{list(before.shape)} {before.placements}, and its place cannot be told: give the "
                "style use_local_output=False."
            )
        placements = [Shard(axis)]
    return functools.partial(_as_part, mesh=mesh, placements=placements, shape=before.shape)


def _as_part(
    x: Tensor, mesh: DeviceMesh, placements: list[Placement], shape: torch.Size
) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(x, mesh, placements, run_check=False, shape=shape, stride=stride)


def _sharded_axis(before: DTensor, after: Tensor) -> int | None:
    mesh = before.device_mesh
    axes = [i for i in range(before.ndim) if before.shape[i] != after.shape[i]]
    if before.ndim != after.ndim or len(axes) != 1:
        return None
    (axis,) = axes
    first, each = chunk_of(mesh, 0, before.shape[axis])
    here = min(each, before.shape[axis] - first)
    return axis if here == after.shape[axis] else None
