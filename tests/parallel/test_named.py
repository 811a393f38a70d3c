"""A rank's name for a mesh differs wherever code that was made for the mesh would."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch._inductor.codecache import FxGraphCachePickler
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fxdistill.compiler.cached import caching_of
from fxdistill.compiler.mesh_keys import meshes_named
from fxdistill.parallel.named import place_of


@contextlib.contextmanager
def rank_of(rank: int, ranks: int) -> Iterator[None]:
    """This process as one of several that do not exist."""
    dist.init_process_group("fake", rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def grid(*shape: int, names: Any = None) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def test_ranks_shapes_names_and_groups_are_told_apart_and_nothing_else() -> None:
    found = []
    for ranks, rank in ((4, 0), (4, 0), (4, 1), (8, 0)):
        with rank_of(rank, ranks):
            found.append(place_of(DeviceMesh("cpu", [0, 1, 2, 3])))
    assert found[0] == found[1]
    assert len(set(found)) == 3
    with rank_of(0, 4):
        plain, named = place_of(grid(4)), place_of(grid(4, names=("tp",)))
        square = grid(2, 2, names=("dp", "tp"))
        names = [plain, named, place_of(square), place_of(square["tp"]), place_of(square["dp"])]
        names.append(place_of(grid(2, 2, names=("dp", "tp"))["tp"]))  # its groups are others
        names += [place_of(DeviceMesh("cpu", [0, 2, 1, 3])), place_of(square.get_group("tp"))]
        assert len(set(names)) == len(names)
        assert place_of(torch.ones(2)) is None


def test_the_key_of_a_step_is_its_ranks() -> None:
    graph = torch.fx.symbolic_trace(lambda x: x + 1)
    keys = [caching_of(graph, ()).key]
    for ranks, rank in ((2, 0), (2, 1), (4, 0)):
        with rank_of(rank, ranks):
            keys.append(caching_of(graph, ()).key)
    assert len(set(keys)) == 4


def test_torchs_own_reducer_is_back_when_the_step_is_lowered() -> None:
    own = FxGraphCachePickler._reduce_fake_script_object
    with rank_of(0, 2):
        with contextlib.suppress(ZeroDivisionError), meshes_named():
            assert FxGraphCachePickler._reduce_fake_script_object is not own
            raise ZeroDivisionError
        assert FxGraphCachePickler._reduce_fake_script_object is own
    with meshes_named():
        assert FxGraphCachePickler._reduce_fake_script_object is own  # this process is alone
