"""``mesh=``: unmodified Hugging Face models, loss and every gradient of one process."""

import os
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

import families
import fxdistill
from fxdistill import Match, errors
from mesh_steps import AOT, MODES, compare, measured, mine
from processes import run

Case = tuple[str, str, dict[str, Any]]
# What is captured has few layers, but for one case a mesh.
MADE = {**families.FAMILIES, "shallow": families.shallow_llama}


def check_one(family: str, mode: str, options: Any, mesh: DeviceMesh, **more: Any) -> None:
    one, here = MADE[family](), MADE[family]()
    given = {"mapping": one.mapping, **options}
    torch.manual_seed(2)
    alone = fxdistill.wrap(one.student, one.teacher, compile=False, **given)
    wanted = measured(alone, one.batch, one.labels)
    given = {"mesh": mesh, "compile": MODES[mode], **given, **more}
    # Random projections start alike, whatever the seed of a rank.
    torch.manual_seed(2 + 100 * mesh.get_coordinate()[0])  # type: ignore[index]
    distiller = fxdistill.wrap(here.student, here.teacher, **given)
    batch = {name: mine(mesh, x) for name, x in here.batch.items()}
    found = measured(distiller, batch, mine(mesh, here.labels))
    compare(found, wanted, (family, mode, options, mesh.mesh_dim_names))
    torch._dynamo.reset()


def parity(rank: int, shape: tuple[int, ...], names: tuple[str, ...], cases: list[Case]) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for family, mode, options in cases:
        check_one(family, mode, options, mesh)


def both(captured: str = "llama") -> list[Case]:
    return [("llama", "eager", {}), (captured, "one graph", {})]


@pytest.mark.slow
def test_tensor_and_sequence_parallel() -> None:
    others: list[Case] = [(name, "eager", {}) for name in ("qwen3", "bamba")]
    run(2, parity, (2,), ("tp",), [*both(), *others])


@pytest.mark.slow
def test_sharded_parameters() -> None:
    run(2, parity, (2,), ("dp",), [*both("shallow"), ("bamba", "eager", {})])


@pytest.mark.slow
def test_two_dimensions() -> None:
    run(4, parity, (2, 2), ("dp", "tp"), both("shallow"))


INSIDE = {"model.layers.0.self_attn.q_proj": "model.layers.1.self_attn.q_proj"}


def options(rank: int, axis: str) -> None:
    """Everything beside the plain case."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(axis,))
    for mode, given in (
        ("regional", {}),
        ("one graph", {"mapping": None, "logit_loss": None}),
        ("eager", {"mapping": projected()}),
        ("eager", {"mapping": INSIDE}),
        ("one graph", {"mapping": projected(), "feature_loss": "cosine"}),
    ):
        check_one("shallow", mode, given, mesh)
    if axis == "dp":
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("replicate",))
        check_one("llama", "eager", {}, mesh)


def projected() -> list[Match]:
    parts = ("self_attn", "mlp")
    return [
        Match(f"model.layers.0.{part}", f"model.layers.1.{part}", project="linear")
        for part in parts
    ]


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tp", "dp"])
def test_options(axis: str) -> None:
    run(2, options, axis)


def mlps() -> dict[str, ParallelStyle]:
    return {
        "model.layers.*.mlp.*_proj": ColwiseParallel(),
        "model.layers.*.mlp.down_proj": RowwiseParallel(),
    }


def own_plan(rank: int) -> None:
    """A plan of the user's: MLPs only, for the student; the teacher whole on every rank."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    given = {"student_plan": mlps(), "teacher_plan": {}}
    check_one("llama", "eager", {}, mesh, **given)


@pytest.mark.slow
def test_plans() -> None:
    run(2, own_plan)


def bad(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    family = families.FAMILIES["llama"]()
    student, teacher = family.student, family.teacher

    def wrap(error: Any, match: str, s: Any = student, t: Any = teacher, **given: Any) -> None:
        before = [(name, p, p.data_ptr()) for name, p in s.named_parameters()]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in s.modules()]
        with pytest.raises(error, match=match):
            fxdistill.wrap(s, t, **{"mesh": mesh, "compile": False, **given})
        after = [(name, p, p.data_ptr()) for name, p in s.named_parameters()]
        assert [(n, id(p), x) for n, p, x in before] == [(n, id(p), x) for n, p, x in after]
        assert not any(isinstance(b, DTensor) for b in s.buffers())
        assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in s.modules()]

    wrap(errors.OptionError, "init_device_mesh", mesh="tp")
    wrap(errors.MeshError, "without names", mesh=init_device_mesh("cpu", (2,)))
    wrap(errors.MeshError, "'cp'", mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("cp",)))
    wrap(errors.MeshError, "share", t=student)
    wrap(errors.PathError, "Nearest", student_plan={"model.layers.*.ffn": ColwiseParallel()})
    wrap(errors.OptionError, "ParallelStyle", student_plan={"model.norm": "colwise"})
    wrap(errors.MeshError, "no ready-made", s=families.FAMILIES["t5"]().student)
    act = {"model.layers.0.mlp.act_fn": "model.layers.0.mlp.act_fn"}
    wrap(errors.MeshError, "lies within 'model.layers.0.mlp'", mapping=act)
    tied = families.FAMILIES["gpt2"]().student
    wrap(errors.MeshError, "one parameter", s=tied, student_plan={"lm_head": ColwiseParallel()})
    tied.transformer.drop.p = 0.1
    wrap(errors.MeshError, "drift apart", s=tied)
    data = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    wrap(errors.OptionError, "'tp'", mesh=data, student_plan={})
    wrap(errors.OptionError, "mesh=", mesh=None, student_plan={})
    # What is found behind the sharding: a path that the teacher does not run, or a bad shape.
    batch = dict(family.batch)
    mismatch = {"model.layers.0.mlp": "model.layers.0.mlp.gate_proj"}
    wrap(errors.ShapeError, "project", mapping=mismatch, example_inputs=batch)
    # Ranks that were asked for different things.
    layer = f"model.layers.{rank}.mlp"
    wrap(errors.MeshError, "ranks disagree", mapping={layer: "model.layers.0.mlp"})
    wrap(errors.MeshError, "ranks disagree", temperature=1.0 + rank)
    distiller = fxdistill.wrap(student, teacher, mesh=mesh, compile=False)
    distiller(**family.batch)  # none of it has hurt
    with pytest.raises(errors.MeshError, match="parallel already"):
        fxdistill.wrap(student, teacher, mesh=mesh)


@pytest.mark.slow
def test_bad_input() -> None:
    run(2, bad)


def unlike(rank: int) -> None:
    """Ranks that were built unlike get the weights of rank 0, and what was frozen stays frozen."""
    for axis in ("tp", "dp"):
        one, here = families.FAMILIES["llama"](), families.FAMILIES["llama"]()
        for family in (one, here):
            for name, p in family.student.named_parameters():
                p.requires_grad_("norm" not in name)
        if rank:
            with torch.no_grad():
                for model in (here.student, here.teacher):
                    for tensor in (*model.parameters(), *model.buffers()):
                        tensor += 0.1
        wanted = measured(
            fxdistill.wrap(one.student, one.teacher, one.mapping, compile=False),
            one.batch,
            one.labels,
        )
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(axis,))
        distiller = fxdistill.wrap(
            here.student, here.teacher, here.mapping, compile=False, mesh=mesh
        )
        trained = {name for name, p in distiller.named_parameters() if p.requires_grad}
        assert trained == {name for name, g in wanted[1].items() if g is not None}
        batch = {name: mine(mesh, x) for name, x in here.batch.items()}
        found = measured(distiller, batch, mine(mesh, here.labels))
        kept = {name: g for name, g in wanted[1].items() if g is not None}
        compare(found, (wanted[0], kept), axis)


@pytest.mark.slow
def test_ranks_that_were_built_unlike() -> None:
    run(2, unlike)


def lengths(rank: int) -> None:
    """Another length is another graph where values are DTensors, and the same numbers."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    one, here = families.shallow_llama(), families.shallow_llama()
    alone = fxdistill.wrap(one.student, one.teacher, one.mapping, compile=False)
    distiller = fxdistill.wrap(here.student, here.teacher, here.mapping, compile=AOT, mesh=mesh)
    for length in (11, 7):
        batch = {name: x[:, -length:] for name, x in one.batch.items()}
        labels = one.labels[:, -length:]
        alone.zero_grad()
        distiller.zero_grad()
        wanted = measured(alone, batch, labels)
        own = {name: mine(mesh, x) for name, x in batch.items()}
        compare(measured(distiller, own, mine(mesh, labels)), wanted, length)


@pytest.mark.slow
def test_a_second_length() -> None:
    run(2, lengths)


def one_of_four(rank: int) -> str:
    """One rank was asked for something else: all four hear of it, and none waits for another."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    family = families.FAMILIES["llama"]()
    start = time.monotonic()
    with pytest.raises(errors.MeshError, match=r"rank 0 has .*, rank 3 has"):
        fxdistill.wrap(
            family.student,
            family.teacher,
            {f"model.layers.{rank // 3}.mlp": "model.layers.0.mlp"},
            mesh=mesh,
            compile=False,
        )
    assert time.monotonic() - start < 30
    # And in the first step: one rank of a "tp" line has samples of its own.
    distiller = fxdistill.wrap(
        family.student, family.teacher, family.mapping, mesh=mesh, compile=False
    )
    batch = {name: mine(mesh, x) for name, x in family.batch.items()}
    weights = torch.ones_like(batch["input_ids"], dtype=torch.float32)
    if rank == 3:
        weights[:, :4] = 0
    for _ in range(2):  # until it is mended
        with pytest.raises(errors.MeshError, match="differ between ranks"):
            distiller(**batch, token_weights=weights)
    return "told"


@pytest.mark.slow
def test_one_rank_of_four_disagrees() -> None:
    assert run(4, one_of_four) == ["told"] * 4


class Listener(nn.Module):
    """Halves its sequence, as speech models do: nothing is sharded by that."""

    def __init__(self) -> None:
        super().__init__()
        self.fold = nn.Conv1d(4, 8, 2, stride=2)
        self.id = nn.Identity()
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.id(self.fold(x.mT).mT).mean(1))


def halved(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    distiller = fxdistill.wrap(
        Listener(), Listener(), {"id": "id"}, mesh=mesh, task="classification", compile=False
    )
    distiller(torch.randn(2, 12, 4)).loss.backward()


@pytest.mark.slow
def test_a_shorter_sequence_is_no_shard() -> None:
    run(2, halved)


def within(rank: int) -> None:
    """In a plan of the user's own nothing tells that a value is a rank's own, but the values."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    family = families.FAMILIES["llama"]()
    act = {"model.layers.0.mlp.act_fn": "model.layers.0.mlp.act_fn"}
    plans = {"student_plan": mlps(), "teacher_plan": mlps()}
    distiller = fxdistill.wrap(
        family.student, family.teacher, act, mesh=mesh, compile=False, **plans
    )
    with pytest.raises(errors.MeshError, match=r"act_fn \(.* to .*\) differ between ranks"):
        distiller(**family.batch)


@pytest.mark.slow
def test_values_within_sharded_layers() -> None:
    run(2, within)


def dying(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    family = families.FAMILIES["llama"]()
    distiller = fxdistill.wrap(family.student, family.teacher, compile=False, mesh=mesh)
    if rank:
        os._exit(3)
    distiller(**family.batch, labels=family.labels)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank 0|died"):
        run(2, dying)
    assert time.monotonic() - start < 90


def traffic(rank: int) -> dict[str, tuple[str, ...]]:
    """What the report says, by case: matches alone; with a head; samples on the ranks."""
    said = {}
    for name, axis, given in (
        ("matches", "tp", {"logit_loss": None, "feature_loss": "mse"}),
        ("head", "tp", {}),
        ("samples", "dp", {}),
    ):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(axis,))
        family = families.shallow_llama()
        distiller = fxdistill.wrap(
            family.student, family.teacher, family.mapping, mesh=mesh, compile=AOT, **given
        )
        batch = {key: mine(mesh, x) for key, x in family.batch.items()}
        labels = {} if name == "matches" else {"labels": mine(mesh, family.labels)}
        distiller(**batch, **labels).loss.backward()
        record = next(r for r in distiller.program.history if r.name == "CountCollectives")
        said[name] = record.remarks
        torch._dynamo.reset()
    return said


@pytest.mark.slow
def test_what_the_terms_add() -> None:
    said = run(2, traffic)[0]
    # Two matches: one sum of two numbers.
    assert said["matches"][1] == "terms add: 1 all_reduce (8 B)"
    # The heads take all tokens: hidden states are gathered, and the student's gradient scattered.
    head = "terms add: 2 all_gather (9.00 KiB), 1 all_reduce (8 B), 1 reduce_scatter (2.25 KiB)"
    assert said["head"][1] == head
    # Four denominators, then five values.
    assert said["samples"][1] == "terms add: 2 all_reduce (36 B)"
    assert "reduce_scatter" in said["samples"][0]
