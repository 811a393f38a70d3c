"""After the first step: do all ranks have the same losses?

A value that no parallel style has touched is a plain tensor, and taken to be alike on every rank.
Inside of sharded layers it is not, and nothing about the tensor tells.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from fxdistill.errors import MeshError

TOLERANCE = 1e-4  # relative; what sums in another order differ by is a tenth of that at most


def require_alike(terms: Mapping[str, Tensor], models: Iterable[nn.Module]) -> None:
    """MeshError, on every rank, where a term differs between ranks of the models' meshes."""
    meshes: set[DeviceMesh] = {
        p.device_mesh for model in models for p in model.parameters() if isinstance(p, DTensor)
    }
    own = torch.stack([value.detach().float().reshape(()) for value in terms.values()])
    for group in [group for mesh in meshes for group in mesh.get_all_groups()]:
        if dist.get_backend(group) == "fake":
            continue
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, own, group=group)
        values = torch.stack(everyone)
        spread = values.amax(0) - values.amin(0)
        apart = spread > TOLERANCE * values.abs().amax(0) + 1e-12
        if bool(apart.any()):
            wrong = [name for name, differs in zip(terms, apart.tolist(), strict=True) if differs]
            name = wrong[-1]
            each = ", ".join(f"{v:.6g}" for v in values[:, list(terms).index(name)].tolist())
            raise MeshError(
                f"{', '.join(wrong)} differ between ranks that should agree ({name}: {each}). "
                "Either those ranks were given different samples (along 'tp' all take the same), "
                "or a matched value is one rank's part of a sharded layer in a plain tensor: match "
                "the layer itself, or give its parallel style use_local_output=False."
            )
