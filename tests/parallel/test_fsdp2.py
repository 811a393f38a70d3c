"""FSDP2 in regional mode: logits are not made, and loss and gradients are those of one process."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import fxdistill
from fxdistill.losses.fused import sizes
from heads import remarks
from mesh_steps import compare, gradients_of
from placed_models import LM
from processes import run

V = 61
FEATURES = {"blocks.0": "blocks.1"}
ROWS = (slice(0, 1), slice(1, 4))  # each rank's


class Unseen(LM):
    """Makes its logits, because it does to them what no stand-in can follow."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).clone()


class Halved(LM):
    """Its root returns another tensor than its head."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).float() / 2


def towers(kind: type[LM] = LM, teacher: type[LM] = LM, tied: bool = False) -> tuple[LM, LM]:
    torch.manual_seed(0)
    student, other = kind(V, 16, 2, bias=True), teacher(V, 16, 3)
    if tied:
        student.lm_head.weight = student.embed.weight
    return student, other


def batch(rows: slice, length: int = 8) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows of four, whose tokens count unevenly."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 60, (4, length), generator=g)
    labels, weights = ids.clone(), torch.rand(4, length, generator=g)
    labels[0, :5], weights[2, 3:] = -100, 0.0
    return ids[rows], {"labels": labels[rows], "token_weights": weights[rows]}


def sharded(model: LM, how: str, output: torch.dtype | None = None, **options: Any) -> LM:
    """``fully_shard`` each block, then what ``how`` says, then the model."""
    if how == "plain":
        return model
    hybrid = {"mesh_shape": (2, 1), "mesh_dim_names": ("replicate", "shard")}
    options["mesh"] = init_device_mesh(
        "cpu", **(hybrid if how == "hybrid" else {"mesh_shape": (2,)})
    )
    if not how.startswith("one unit"):
        for block in model.blocks:
            fully_shard(block, **options)
    if how == "head":
        fully_shard(model.lm_head, **options)
    elif how == "head, kept":
        fully_shard(model.lm_head, reshard_after_forward=False, **options)
    elif how == "norm and head":
        fully_shard([model.norm, model.lm_head], **options)
    elif how == "embedding and head":
        fully_shard([model.embed, model.lm_head], **options)
    resharding = {"root, freed": True, "root, kept": False}.get(how)
    if output is not None:
        options["mp_policy"] = dataclasses.replace(options["mp_policy"], output_dtype=output)
    fully_shard(model, reshard_after_forward=resharding, **options)
    if how == "one unit, read":
        model.register_forward_hook(lambda module, args, logits: logits.sum().item() and None)
    return model


def wrapped(student: LM, teacher: LM, compile: Any, **options: Any) -> Any:
    own = {"task": "causal_lm", "temperature": 2.0, "label_weight": 0.7, **options}
    return fxdistill.wrap(student, teacher, FEATURES, compile=compile, **own)


def steps(distiller: Any, rows: slice, count: int = 2) -> list[Any]:
    """Losses and gradients of some steps; an evaluation in between."""
    ids, own = batch(rows)
    found = []
    for _ in range(count):
        out = distiller(ids, **own)
        assert out.loss._base is None
        out.loss.backward()
        found.append(({"loss": out.loss.detach(), **out.losses}, gradients_of(distiller)))
        torch.optim.SGD(distiller.parameters(), 0.5, foreach=False).step()
        distiller.zero_grad()
        with torch.no_grad():
            distiller(ids, **own)
    return found


# How the student is sharded, how the teacher is, what else, and what is said of the logits.
FUSED = "logits fused"
CASES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "root": ("root", "plain", {}, FUSED),
    "root, teacher too": ("root", "root", {}, FUSED),
    "root, kept": ("root, kept", "plain", {}, FUSED),
    "root, freed": ("root, freed", "root, freed", {}, FUSED),
    "one unit": ("one unit", "one unit", {}, FUSED),
    "head": ("head", "head", {}, FUSED),
    "head, kept": ("head, kept", "plain", {}, FUSED),
    "norm and head": ("norm and head", "root", {}, FUSED),
    "tied": ("root", "plain", {"tied": True}, FUSED),
    "tied, one group": ("embedding and head", "plain", {"tied": True}, FUSED),
    "hybrid": ("hybrid", "plain", {}, FUSED),
    "scaled": ("head", "head", {"kind": Halved, "teacher": Halved}, FUSED),
    # The graph of the losses makes the student's logits, with a weight that was freed before.
    "unfused, head": ("head", "plain", {"teacher": Unseen}, "the teacher's logits come from"),
    "unfused, root": ("root", "root", {"teacher": Unseen}, "the teacher's logits come from"),
    "unfused, unit": ("one unit", "plain", {"teacher": Unseen}, "the teacher's logits come from"),
    # The model makes them, after its head has run.
    "made, head": ("head", "plain", {"kind": Unseen}, "the student's logits come from"),
    # A hook of the user's own reads them when FSDP2 has put its hooks on them.
    "read": ("one unit, read", "plain", {}, "the student's logits come from"),
}


def parity(rank: int, names: list[str]) -> None:
    for name in names:
        of_student, of_teacher, models, said = CASES[name]
        wanted = steps(wrapped(*towers(**models), False), slice(None))
        student, teacher = towers(**models)
        sharded(student, of_student)
        sharded(teacher, of_teacher)
        distiller = wrapped(student, teacher, "regional")
        found = steps(distiller, ROWS[rank])
        for i, (here, there) in enumerate(zip(found, wanted, strict=True)):
            compare(here, there, (name, i))
        assert said in str(remarks(distiller)), (name, remarks(distiller))
        torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_parity(part: int) -> None:
    run(2, parity, list(CASES)[part::3])


def accumulation(rank: int, names: list[str]) -> None:
    """Two micro-batches of which the last is reduced; the number of items is global."""
    items = {"num_items": torch.tensor(17.0), "num_feature_items": torch.tensor(19.0)}
    parts = ((slice(0, 1), slice(2, 3)), (slice(1, 2), slice(3, 4)))
    for name in names:
        of_student, of_teacher, models, _ = CASES[name]
        alone = wrapped(*towers(**models), False)
        ids, own = batch(slice(None))
        alone(ids, **own, **items).loss.backward()
        student, teacher = towers(**models)
        sharded(student, of_student)
        sharded(teacher, of_teacher)
        distiller = wrapped(student, teacher, "regional")
        for last, rows in enumerate(parts[rank]):
            student.set_requires_gradient_sync(bool(last))
            ids, own = batch(rows)
            distiller(ids, **own, **items).loss.backward()
        compare(({}, gradients_of(distiller)), ({}, gradients_of(alone)), name)
        assert FUSED in str(remarks(distiller))
        torch._dynamo.reset()


@pytest.mark.slow
def test_accumulation() -> None:
    run(2, accumulation, ["root", "head", "norm and head", "tied"])


def mixed(rank: int) -> None:
    """In bfloat16 the fused form is as near to float32 as logits that are made."""
    wanted = steps(wrapped(*towers(), False), slice(None), 1)[0][1]
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for how in ("root", "head"):
        errors = []
        for options in ({"fuse_head": True}, {"fuse_head": False}):
            student, teacher = towers()
            for model in (student, teacher):
                sharded(model, how, mp_policy=policy, output=torch.float32)
            distiller = wrapped(student, teacher, "regional")
            distiller.options = dataclasses.replace(distiller.options, **options)
            found = steps(distiller, ROWS[rank], 1)[0][1]
            assert all(g.dtype == torch.float32 for g in found.values())
            errors.append({n: float((found[n] - g).norm() / g.norm()) for n, g in wanted.items()})
            if options["fuse_head"]:
                assert FUSED in str(remarks(distiller))
                assert distiller.program is not None
                dtypes = {
                    node.meta["example_value"].dtype
                    for node in distiller.program.gm.graph.nodes
                    if node.op == "placeholder" and tuple(_shape(node)) == (V, 16)
                }
                assert dtypes == {torch.bfloat16}
        for name, error in errors[0].items():
            assert error <= max(1.3 * errors[1][name], 0.01), (how, name, error, errors[1][name])
        torch._dynamo.reset()


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(getattr(node.meta.get("example_value"), "shape", ()))


@pytest.mark.slow
def test_mixed_precision() -> None:
    run(2, mixed)


def largest(rank: int) -> list[int]:
    """The largest piece of memory that a step asks for, by how the head is kept."""
    sizes.ON_CPU = sizes.Sizes(0, 16)  # chunks as small as they get: 160 tokens
    found = []
    for how, fuse in (("root", False), ("root", True), ("head", True)):
        torch.manual_seed(0)
        student, teacher = (sharded(LM(2000, 16, layers), how) for layers in (2, 3))
        distiller = wrapped(student, teacher, "regional")
        distiller.options = dataclasses.replace(distiller.options, fuse_head=fuse)
        ids, own = batch(slice(0, 2), 320)
        distiller(ids, **own).loss.backward()
        with torch.profiler.profile(profile_memory=True) as profile:
            distiller(ids, **own).loss.backward()
        events = profile.profiler.kineto_results.events()
        found.append(max(e.nbytes() for e in events if e.name() == "[memory]"))
        torch._dynamo.reset()
    return found


@pytest.mark.slow
def test_no_logits() -> None:
    made, *fused = run(2, largest)[0]
    logits = 2 * 320 * 2000 * 4
    assert made >= logits
    assert max(fused) < logits / 2, fused


def declined(rank: int) -> None:
    """A head that is tensor parallel too is left alone."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    wanted = steps(wrapped(*towers(), False), slice(None), 1)
    student, teacher = towers()
    style = ColwiseParallel(use_local_output=False)
    parallelize_module(student, mesh["tp"], {"lm_head": style})
    fully_shard(student, mesh=mesh["dp"])
    distiller = wrapped(student, teacher, "regional")
    compare(steps(distiller, ROWS[rank], 1)[0], wanted[0], "tensor parallel")
    reason = "the student's head is tensor parallel inside of fully_shard"
    assert str(remarks(distiller)).endswith(reason), remarks(distiller)


@pytest.mark.slow
def test_declined() -> None:
    run(2, declined)
