"""Several teachers, heads and mutual students on a mesh: loss and gradients of one process."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import families
import fxdistill
from fxdistill import Head, Match
from mesh_steps import AOT, compare, measured, mine
from processes import run

PATH = "model.layers.0.mlp"


def models(count: int) -> tuple[list[nn.Module], Any]:
    """Llamas of one family: the student first, then teachers of other weights."""
    family = families.shallow_llama()
    found = [family.student, family.teacher]
    torch.manual_seed(7)
    for _ in range(count - 2):
        other = families.shallow_llama().teacher
        with torch.no_grad():
            for p in other.parameters():
                p.add_(0.02 * torch.randn_like(p))
        found.append(other)
    return found, family


def two_teachers(**options: Any) -> Any:
    (student, one, two), family = models(3)
    mapping = [Match(PATH, PATH, of="two", loss="cosine", project="auto")]
    named = {"one": one, "two": two}
    return fxdistill.wrap(
        student, named, mapping, teacher_weights=(3, 1), temperature=2.0, **options
    ), family


def heads(**options: Any) -> Any:
    (student, teacher), family = models(2)
    config = student.config
    further = nn.Linear(config.hidden_size, config.vocab_size)
    given = {
        "ahead": Head("model.layers.0", module=further, shift=2, logit_weight=0.5),
        "own": Head("model.layers.0", module="auto", teacher="self", logit_weight=0.5),
    }
    return fxdistill.wrap(student, teacher, heads=given, temperature=2.0, **options), family


def students(**options: Any) -> Any:
    found, family = models(3)
    mapping = [Match(PATH, PATH, loss="cosine", project="auto")]
    return fxdistill.mutual(found, mapping, temperature=2.0, peers="probabilities", **options), (
        family
    )


BUILT = {"two teachers": two_teachers, "heads": heads, "mutual": students}


def check_one(what: str, compile: Any, mesh: DeviceMesh) -> None:
    torch.manual_seed(2)
    alone, family = BUILT[what](compile=False)
    wanted = measured(alone, family.batch, family.labels)
    torch.manual_seed(2)
    distiller, _ = BUILT[what](compile=compile, mesh=mesh)
    batch = {name: mine(mesh, x) for name, x in family.batch.items()}
    if what == "heads" and compile:  # the number of all ranks, which changes nothing
        read = family.batch["attention_mask"][:, :-1] == 1
        batch["num_items"] = ((family.labels[:, 1:] != -100) & read).sum()
    found = measured(distiller, batch, mine(mesh, family.labels))
    compare(found, wanted, (what, compile, mesh.mesh_dim_names))
    torch._dynamo.reset()


def parity(rank: int, name: str, cases: list[tuple[str, Any]]) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(name,))
    for what, compile in cases:
        check_one(what, compile, mesh)


# Each in one graph once: captures take most of the time.
CASES = {
    "dp": [*((what, False) for what in BUILT), ("heads", AOT)],
    "tp": [*((what, False) for what in BUILT), ("two teachers", AOT), ("mutual", AOT)],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_on_a_mesh(name: str) -> None:
    """Only here do several towers get shardings, plans and agreeing terms of their own."""
    run(2, parity, name, CASES[name])
