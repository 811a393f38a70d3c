"""Activation checkpoints of students on a mesh: loss and gradients of one process without them."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import families
import fxdistill
from fxdistill.errors import StepError
from mesh_steps import MODES, compare, gradients_of, split
from processes import run

CASES = [(kind, mode) for kind in ("dp", "tp") for mode in ("eager", "one graph", "regional")]


def towers(reentrant: bool | None = None, dropout: float = 0.0) -> families.Family:
    torch.manual_seed(2)
    family = families.shallow_llama()
    for layer in family.student.model.layers:
        layer.self_attn.attention_dropout = dropout
    if reentrant is not None:
        family.student.gradient_checkpointing_enable({"use_reentrant": reentrant})
    family.student.train()
    return family


def steps(family: families.Family, batch: Any, labels: Any, **options: Any) -> list[Any]:
    found = []
    distiller = fxdistill.wrap(family.student, family.teacher, family.mapping, **options)
    optimizer = torch.optim.SGD(distiller.parameters(), 0.5)
    for _ in range(2):
        out = distiller(**batch, labels=labels)
        out.loss.backward()
        found.append(({"loss": out.loss.detach(), **out.losses}, gradients_of(distiller)))
        optimizer.step()
        optimizer.zero_grad()
    return found


def parity(rank: int, kind: str, mode: str) -> None:
    one = towers()
    wanted = steps(one, one.batch, one.labels, compile=False)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(kind,))
    mine = split(one.batch, one.labels, 2)[rank] if kind == "dp" else (one.batch, one.labels)
    family = towers(reentrant=False)
    before = counted(family.student)
    found = steps(family, *mine, compile=MODES[mode], mesh=mesh)
    for i, (here, there) in enumerate(zip(found, wanted, strict=True)):
        compare(here, there, (kind, mode, i))
    assert counted(family.student) == before  # no weight is left in place of a parameter


def counted(model: nn.Module) -> list[str]:
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if isinstance(parameter, nn.Parameter)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_parity(kind: str, mode: str) -> None:
    run(2, parity, kind, mode)


def random(rank: int) -> None:
    """In one graph what drops out is the same when it is computed again."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    found = []
    for reentrant in (None, False):
        family = towers(reentrant, dropout=0.3)
        mine = split(family.batch, family.labels, 2)[rank]
        torch.manual_seed(rank)
        found.append(steps(family, *mine, compile=MODES["one graph"], mesh=mesh))
        torch._dynamo.reset()
    for i in range(2):
        compare(found[1][i], found[0][i], i)
    assert found[0][0][0]["loss"] != found[0][1][0]["loss"]


@pytest.mark.slow
def test_random_operators() -> None:
    run(2, random)


def reentrant(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    family = towers(reentrant=True)
    mine, labels = split(family.batch, family.labels, 2)[rank]
    distiller = fxdistill.wrap(family.student, family.teacher, {}, compile=False, mesh=mesh)
    out = distiller(**mine, labels=labels)
    with pytest.raises(StepError, match="use_reentrant=False"):
        out.loss.backward()
    assert counted(family.student) == counted(towers().student)


@pytest.mark.slow
def test_reentrant() -> None:
    run(2, reentrant)
