"""Check after the first step that all ranks have the same losses.

A matched value that is a plain tensor is taken to be the same on every rank. Inside a sharded layer
it is not, and nothing about the tensor tells.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from fxdistill.errors import MeshError

TOLERANCE = 1e-4  # relative; another order of summation changes a loss by a tenth of this at most


def require_alike(terms: Mapping[str, Tensor], models: Iterable[nn.Module]) -> None:
    """Raise MeshError, on every rank, if a term differs between ranks of the models' meshes."""
    meshes: set[DeviceMesh] = {
        p.device_mesh for model in models for p in model.parameters() if isinstance(p, DTensor)
    }
    own = torch.stack([value.detach().float().reshape(()) for value in terms.values()])
    # Gather the bounds of all ranks, one mesh dimension after the other, before any rank raises:
    # the others would wait for it. Sorted, because a set has another order on each rank.
    low, high = own, own
    for group in [g for mesh in sorted(meshes, key=str) for g in mesh.get_all_groups()]:
        if dist.get_backend(group) == "fake":
            continue
        bounds = torch.stack([low, high])
        everyone = [torch.empty_like(bounds) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, bounds, group=group)
        low, high = torch.stack(everyone).amin((0, 1)), torch.stack(everyone).amax((0, 1))
    apart = (high - low > TOLERANCE * torch.maximum(low.abs(), high.abs()) + 1e-12).tolist()
    wrong = [
        f"{name} ({a:.6g} to {b:.6g})"
        for name, a, b, differs in zip(terms, low.tolist(), high.tolist(), apart, strict=True)
        if differs
    ]
    if wrong:
        raise MeshError(
            f"{', '.join(wrong)} differ between ranks that should agree. Either those ranks were "
            "given different samples (along 'tp' all take the same), or a matched value is one "
            "rank's part of a sharded layer in a plain tensor: match the layer itself, or give its "
            "parallel style use_local_output=False."
        )
