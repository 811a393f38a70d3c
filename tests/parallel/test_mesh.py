"""``mesh=``: unmodified Hugging Face models, loss and every gradient of one process."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import families
import fxdistill
from parallel.processes import run
from parallel.test_tensor_parallel import AOT, compare

MODES: dict[str, Any] = {"eager": False, "one graph": AOT, "regional": "regional"}
Case = tuple[str, str, dict[str, Any]]


def measured(distiller: Any, batch: dict[str, Tensor], labels: Tensor) -> Any:
    out = distiller(**batch, labels=labels)
    out.loss.backward()
    gradients = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in distiller.named_parameters()
    }
    return {"loss": out.loss.detach(), **out.losses}, gradients


def mine(mesh: DeviceMesh, x: Tensor) -> Tensor:
    """This rank's samples: three on two ranks are two and one."""
    if "dp" not in (mesh.mesh_dim_names or ()):
        return x
    return x.chunk(mesh["dp"].size())[mesh["dp"].get_local_rank()]


def parity(rank: int, shape: tuple[int, ...], names: tuple[str, ...], cases: list[Case]) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for family, mode, options in cases:
        one = families.FAMILIES[family]()
        given = {"mapping": one.mapping, **options}
        torch.manual_seed(2)
        alone = fxdistill.wrap(one.student, one.teacher, compile=False, **given)
        wanted = measured(alone, one.batch, one.labels)
        here = families.FAMILIES[family]()
        torch.manual_seed(2)
        distiller = fxdistill.wrap(
            here.student, here.teacher, compile=MODES[mode], mesh=mesh, **given
        )
        batch = {name: mine(mesh, x) for name, x in here.batch.items()}
        found = measured(distiller, batch, mine(mesh, here.labels))
        compare(found, wanted, (family, mode, options, names))
        torch._dynamo.reset()


def both(*names: str) -> list[Case]:
    return [(name, mode, {}) for name in names for mode in ("eager", "one graph")]


@pytest.mark.slow
def test_tensor_and_sequence_parallel() -> None:
    run(2, parity, (2,), ("tp",), [*both("llama", "qwen3"), ("bamba", "eager", {})])


@pytest.mark.slow
def test_sharded_parameters() -> None:
    run(2, parity, (2,), ("dp",), [*both("llama"), ("bamba", "eager", {})])


@pytest.mark.slow
def test_two_dimensions() -> None:
    run(4, parity, (2, 2), ("dp", "tp"), [*both("llama"), ("bamba", "eager", {})])
