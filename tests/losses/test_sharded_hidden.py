"""Matches between tensor-parallel models: loss, terms and gradients of one device."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fxdistill import Match, errors, losses
from mesh_steps import AOT, compare, step
from placed_models import LM, parallel
from processes import run


def own_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    values = (student - teacher).square().sum(-1)
    return (weights * values).sum() / weights.sum()


def towers(width: int = 24, projection: bool = False) -> tuple[LM, LM, Any]:
    torch.manual_seed(0)
    return LM(64, width, 2), LM(64, 24, 3), nn.Linear(16, 24)


DOWN = {"blocks.0.down": "blocks.0.down", "blocks.1.down": "blocks.2.down"}
CASES: dict[str, dict[str, Any]] = {
    "mse": {"mapping": DOWN},
    "l2": {"mapping": DOWN, "feature_loss": "l2"},
    "cosine": {"mapping": DOWN, "feature_loss": functools.partial(losses.cosine)},
    "maps": {
        "mapping": [
            Match("blocks.0.down", "blocks.0.down", loss="attention_transfer"),
            Match("blocks.1.down", "blocks.2.down", loss="fpn"),
        ]
    },
    "streams": {"mapping": {"blocks.*": "blocks.{0,2}", "norm": "norm"}},
    "own": {"mapping": DOWN, "feature_loss": own_loss},
    # What is captured is captured at once.
    "losses": {
        "mapping": [
            Match("blocks.0.down", "blocks.0.down", loss="mse"),
            Match("blocks.0.down", "blocks.1.down", loss="l2"),
            Match("blocks.1.down", "blocks.1.down", loss="cosine"),
            Match("blocks.1.down", "blocks.2.down", loss=own_loss),
            Match("blocks.0.down", "blocks.2.down", loss="attention_transfer"),
            Match("blocks.1.down", "blocks.0.down", loss="fpn"),
        ]
    },
    "hidden width": {"mapping": {"blocks.*.up": "blocks.{0,2}.up"}, "feature_loss": "l2"},
    "inputs": {
        "mapping": [
            Match("blocks.0.down", "blocks.1.down", student_port="input", teacher_port="input"),
            Match("blocks.1", "blocks.2", student_port="input", teacher_port="input"),
        ]
    },
    "projected": {"mapping": [Match("blocks.*.down", "blocks.{0,2}.down", project="linear")]},
    "module": {"mapping": [Match("blocks.0", "blocks.1", project=nn.Linear)]},
    "pooled": {
        "mapping": [Match("blocks.0", "blocks.1", reduce=("b l d -> b d", "mean"))],
    },
}
MODES: dict[str, Any] = {"eager": False, "one graph": AOT, "regional": "regional"}


def options(name: str) -> tuple[dict[str, Any], int]:
    found = dict(CASES[name])
    mapping = found["mapping"]
    width = 16 if name in ("projected", "module") else 24
    if name == "module":
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 24))
        found["mapping"] = [Match("blocks.0", "blocks.1", project=module)]
    elif isinstance(mapping, dict):
        found["mapping"] = {s: t for key, value in mapping.items() for s, t in expanded(key, value)}
    elif name == "projected":
        found["mapping"] = [
            Match(f"blocks.{i}.down", f"blocks.{2 * i}.down", project="linear") for i in (0, 1)
        ]
    return found, width


def expanded(student: str, teacher: str) -> list[tuple[str, str]]:
    if "*" not in student:
        return [(student, teacher)]
    return [(student.replace("*", str(i)), teacher.replace("{0,2}", str(2 * i))) for i in (0, 1)]


def parity(rank: int, ranks: int, cases: list[tuple[str, str, dict[str, Any], int]]) -> None:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    for name, mode, how, length in cases:
        given, width = options(name)
        student, teacher, _ = towers(width)
        torch.manual_seed(2)
        wanted = step(student, teacher, length, False, **given)
        given, width = options(name)
        student, teacher, _ = towers(width)
        parallel(student, mesh, **how)
        parallel(teacher, mesh, **how)
        torch.manual_seed(2)
        found = step(student, teacher, length, MODES[mode], **given)
        compare(found, wanted, (name, mode, how, length))
        if mode == "one graph":  # each term has formed its gradient in the forward
            assert "as they were" not in found[2]["FormGradients"]
            assert f"{len(found[0]) - 4} terms keep" in found[2]["FormGradients"]
        torch._dynamo.reset()


HIDDEN = ("streams", "inputs", "module", "pooled")  # where local sums of a stream are all there is
SEQUENCE, LOCAL, TENSOR = {"sequence": True}, {"sequence": True, "local": True}, {"sequence": False}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_eager(ranks: int) -> None:
    ways = (SEQUENCE, LOCAL, TENSOR) if ranks == 2 else (SEQUENCE,)
    names = [name for name in CASES if name != "losses"]
    cases = [(name, "eager", how, 8) for name in names for how in ways]
    cases += [(name, "eager", SEQUENCE, 7) for name in names]  # of four ranks, 2, 2, 2 and 1
    run(ranks, parity, ranks, [c for c in cases if c[2] is not LOCAL or c[0] not in HIDDEN])


GRAPHS = [("losses", "one graph", how, 8) for how in (LOCAL, TENSOR)]
GRAPHS += [("losses", "one graph", SEQUENCE, 7), ("hidden width", "one graph", LOCAL, 8)]
MORE = [(name, "one graph", SEQUENCE, 8) for name in ("projected", "inputs")]
MORE += [("projected", "regional", LOCAL, 8), ("streams", "regional", SEQUENCE, 8)]


@pytest.mark.slow
@pytest.mark.parametrize("cases", [GRAPHS, MORE], ids=["graphs", "more"])
def test_one_graph_and_regional(cases: list[Any]) -> None:
    run(2, parity, 2, cases)


def parts(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for compile in (False, AOT, "regional"):
        student, teacher, _ = towers()
        for model in (student, teacher):
            parallel(model, mesh, sequence=True, local=True)
        with pytest.raises(errors.MeshError, match="of a sequence of 8") as caught:
            step(student, teacher, 8, compile, mapping={"blocks.0": "blocks.0"})
        assert len(caught.value.problems) == 2


def other_shapes(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    s, t, w = (
        distribute_tensor(torch.randn(shape), mesh, [Shard(1)])
        for shape in ((2, 6, 4), (1, 6, 4), (2, 6))
    )
    for teacher, weights in ((t, None), (s, torch.ones(6)), (s, w[:1])):
        with pytest.raises(errors.ShapeError, match=r"of one shape|of a value \[2, 6, 4\]"):
            losses.mse(s, teacher, weights)
        with pytest.raises(errors.ShapeError, match=r"the same predictions|one for each"):
            losses.forward_kl(s, teacher, weights=weights)
    losses.mse(s, s, w)


def two_meshes(rank: int) -> None:
    student, teacher, _ = towers()
    parallel(student, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), sequence=True)
    grid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("tp", "other"))
    parallel(teacher, grid["other"], sequence=True)
    for compile in (False, AOT):
        with pytest.raises(errors.MeshError, match="on one mesh"):
            step(student, teacher, 8, compile, mapping=DOWN, logit_loss=None, label_loss=None)


@pytest.mark.slow
def test_models_on_two_meshes() -> None:
    run(2, two_meshes)


@pytest.mark.slow
def test_dtensors_of_other_shapes_are_errors() -> None:
    run(2, other_shapes)


@pytest.mark.slow
def test_one_ranks_tokens_are_not_taken_for_the_sequence() -> None:
    run(2, parts)
