"""A second process finds the compiled step of a mesh: each rank its own, and on that mesh only."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh

import fxdistill
from mesh_steps import batch, compare, gradients_of
from placed_models import LM, parallel
from processes import run

PAIRS = {"blocks.0": "blocks.0"}


def wrapped(axis: str, compile: Any) -> tuple[Any, slice]:
    """A distiller on a mesh, or alone, and this rank's samples."""
    torch.manual_seed(0)
    student, teacher = LM(61, 16, 1), LM(61, 16, 1)
    options: dict[str, Any] = {"task": "causal_lm", "compile": compile}
    rows = slice(None)
    if axis == "dp":
        options["mesh"] = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
        rows = slice(dist.get_rank(), None, 2)
    elif axis != "alone":
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        if axis == "tp of two":  # the same ranks, in a group of another name
            mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))["tp"]
        student, teacher = (parallel(m, mesh, sequence=True) for m in (student, teacher))
    return fxdistill.wrap(student, teacher, PAIRS, **options), rows


def inputs(rows: slice) -> dict[str, torch.Tensor]:
    ids, own = batch(8)
    return {"ids": ids[rows], "token_weights": own["token_weights"][rows]}


def step(distiller: Any, rows: slice) -> Any:
    out = distiller(**inputs(rows))
    out.loss.backward()
    return {"loss": out.loss.detach(), **out.losses}, gradients_of(distiller)


def compiled(rank: int, cache: str, axes: list[str]) -> Any:
    """What AOTAutograd's cache did for the step on each mesh, whose numbers are right."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    said = []
    wanted = step(*wrapped("alone", False))
    for axis in axes:
        # Unfused, so that the offset of this rank's vocabulary is in the code of the step itself.
        distiller, rows = wrapped(axis, {"fuse_head": False})
        counters.clear()
        distiller.warmup(**inputs(rows))
        compare(step(distiller, rows), wanted, axis)
        assert [event for event, _ in distiller.journal.events] == ["capture"]
        told = counters["aot_autograd"]
        names = ("hit", "miss", "bypass")
        said.append(tuple(told[f"autograd_cache_{name}"] for name in names))
        torch._dynamo.reset()
    return said


@pytest.mark.slow
def test_each_rank_finds_its_own_step_and_none_of_another_mesh(tmp_path: Any) -> None:
    missed, found = (0, 1, 0), (1, 0, 0)
    assert run(2, compiled, str(tmp_path), ["tp", "dp"]) == [[missed, missed]] * 2
    axes = ["tp", "dp", "tp of two"]
    assert run(2, compiled, str(tmp_path), axes) == [[found, found, missed]] * 2
