"""Names for this rank's place among the others: what code that was made for a mesh depends on.

Tracing writes it into the code: the shape of a mesh, this rank's coordinates, the names and sizes
of process groups. Code of one rank is wrong on another one, and on a mesh of another shape. Private
to torch and used here only: the table of process groups, and some fields of ``DeviceMesh``.
"""

from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d
from torch.distributed.device_mesh import DeviceMesh


def place_of_rank() -> str:
    """This rank, and every process group that it is in; AttributeError where torch hides them."""
    groups = distributed_c10d._world.pg_config_info
    return repr((dist.get_rank(), dist.get_world_size(), groups))


def place_of(x: Any) -> str | None:
    """All that tracing can read of a mesh or a process group; ``None`` for other objects.

    Two of them with one name lead to the same code. Raises AttributeError where torch hides a part.
    """
    if isinstance(x, ProcessGroup):
        return repr((place_of_rank(), x.group_name))
    if not isinstance(x, DeviceMesh):
        return None
    root: Any = x._get_root_mesh()
    others = {**x._flatten_mapping, **root._flatten_mapping}
    flattened = sorted((name, _described(mesh)) for name, mesh in others.items())
    return repr((place_of_rank(), _described(x), _described(root), flattened))


def _described(mesh: Any) -> str:
    ranks = (mesh._flatten_rank_map, mesh._layout, mesh.get_coordinate())
    names = (mesh.device_type, mesh.mesh_dim_names, mesh._dim_group_names)
    return repr((*ranks, *names, mesh._thread_id))
