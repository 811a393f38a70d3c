"""The life of a run: clipping, optimizer steps, checkpoints on other ranks and plans, export."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

import fxdistill
from fxdistill import Distiller, Match, errors
from fxdistill.parallel.gradients import clip_grad_norm_
from matrix import as_gradient, numbers, placed, placements
from placed_models import LM, parallel
from processes import run

VOCABULARY = 61  # sharded unevenly, on two ranks and on four
MAX_NORM = 0.1  # below every norm that is met here
ORDERS = (2.0, math.inf, 3.0)
MAPPING = [Match(f"blocks.{i}.down", f"blocks.{2 * i}.down", project="linear") for i in (0, 1)]


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


# ---------------------------------------------------------------------- the norm


def with_gradient(gradient: Tensor) -> nn.Parameter:
    """A parameter placed like its gradient, but for pending sums."""
    parameter: Any = torch.zeros(gradient.shape)
    if isinstance(gradient, DTensor):
        kinds = as_gradient(gradient.placements)
        parameter = distribute_tensor(parameter, gradient.device_mesh, kinds, src_data_rank=None)
    parameter = nn.Parameter(parameter.to(gradient.dtype))
    parameter.grad = gradient
    return parameter


def everywhere(meshes: Sequence[DeviceMesh]) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors on every placement of every mesh, and plain ones; and what they are in full."""
    for seed, shape in enumerate(((8, 12), (7, 5), (1, 3), (5,))):  # even, uneven, empty on some
        full = numbers(shape, seed)
        yield full.clone(), full
        for mesh in meshes:
            for kinds in placements(len(shape), mesh.ndim):
                yield placed(full, mesh, kinds, seed + 10)[1].detach(), full


def norm_of(full: Sequence[Tensor], order: float) -> Tensor:
    x = torch.cat([f.flatten() for f in full]).double().abs()
    return x.max() if order == math.inf else x.pow(order).sum().pow(1 / order)


class NoWait(TorchDispatchMode):
    """Raises where the host would read a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), "the host waits for a number"
        return func(*args, **(kwargs or {}))


def norms(rank: int) -> None:
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    line = init_device_mesh("cpu", (4,))
    for order in ORDERS:
        gradients, full = zip(*everywhere((grid, line, grid["tp"])), strict=True)
        parameters = [with_gradient(g) for g in gradients]
        idle = nn.Parameter(torch.ones(3))  # without a gradient
        wanted = norm_of(full, order)
        bound = float(wanted) / 2
        with NoWait(), CommDebugMode() as traffic:
            norm = clip_grad_norm_(iter([idle, *parameters]), bound, order)
        assert type(norm) is Tensor
        assert idle.grad is None
        torch.testing.assert_close(norm.double(), wanted, rtol=1e-6, atol=0)
        said: list[Any] = [None] * 4
        dist.all_gather_object(said, float(norm))
        assert len(set(said)) == 1, said
        for p, f in zip(parameters, full, strict=True):
            kinds = p.grad.placements if isinstance(p.grad, DTensor) else ()
            assert not any(kind.is_partial() for kind in kinds)
            torch.testing.assert_close(whole(p.grad), f / 2, rtol=1e-5, atol=1e-7)
        # One for each of the groups dp, tp and all; pending sums of one placement go together.
        counts = {str(op): count for op, count in traffic.get_comm_counts().items()}
        assert counts["c10d.allreduce_"] == 3, counts
        pending = {(g.device_mesh, g.placements) for g in gradients if isinstance(g, DTensor)}
        sums = sum(kind.is_partial() for _, kinds in pending for kind in kinds)
        assert counts["c10d_functional.all_reduce"] <= sums, (counts, sums)


@pytest.mark.slow
def test_norm_of_every_placement_on_several_meshes() -> None:
    run(4, norms)


def odd_values(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for order in ORDERS:
        for bad in (torch.nan, torch.inf):
            g = torch.ones(6)
            g[4] = bad  # on the second rank
            parameters = [with_gradient(distribute_tensor(g, mesh, [Shard(0)]))]
            norm = clip_grad_norm_(parameters, 1.0, order)
            torch.testing.assert_close(norm, torch.tensor(bad), equal_nan=True)
        # What is below the bound stays as it is, and half precision is summed in float32.
        g = torch.full((3, 1000), 0.5, dtype=torch.bfloat16)
        parameters = [with_gradient(distribute_tensor(g, mesh, [Shard(0)])) for _ in range(3)]
        norm = clip_grad_norm_(parameters, 1e6, order)
        torch.testing.assert_close(norm.double(), norm_of([g] * 3, order), rtol=1e-6, atol=0)
        assert all(torch.equal(whole(p.grad), g) for p in parameters)
    # A long pending sum is not copied to go with others.
    g = numbers((300, 300), 0)
    parameters = [with_gradient(placed(g, mesh, p, 1)[1].detach()) for p in placements(2, 1) * 2]
    norm = clip_grad_norm_(parameters, 1.0)
    torch.testing.assert_close(norm.double(), norm_of([g] * 8, 2.0), rtol=1e-6, atol=0)


@pytest.mark.slow
def test_values_that_are_odd() -> None:
    run(2, odd_values)


def test_plain_gradients_are_clipped_as_torch_does() -> None:
    for order in ORDERS:
        pairs = [[with_gradient(numbers((4, 3), i)) for i in range(5)] for _ in range(2)]
        found = clip_grad_norm_(pairs[0], 1.0, order)
        wanted = nn.utils.clip_grad_norm_(pairs[1], 1.0, order)
        assert torch.equal(found, wanted)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(*pairs, strict=True))
    assert clip_grad_norm_([nn.Parameter(torch.ones(2))], 1.0) == 0
    one, other = Run("plain"), Run("plain")
    assert one.backward(0) == other.backward(0)
    assert float(one.distiller.clip_grad_norm_(MAX_NORM)) == other.clip()
    for p, q in zip(one.distiller.parameters(), other.distiller.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    for order in (0.0, -math.inf, math.nan):
        with pytest.raises(errors.OptionError, match="norm_type"):
            clip_grad_norm_(pairs[0], 1.0, order)


# ---------------------------------------------------------------------- steps


def sequences(model: LM, mesh: DeviceMesh) -> LM:
    return parallel(model, mesh, sequence=True)


def no_sequences(model: LM, mesh: DeviceMesh) -> LM:
    """Embedding and norms stay plain tensors."""
    return parallel(model, mesh, sequence=False)


def across(model: LM, mesh: DeviceMesh) -> LM:
    """Every weight of the body sharded along the axis that is whole in the other plans."""
    plan: dict[str, ParallelStyle] = {
        "embed": ColwiseParallel(output_layouts=Replicate()),
        "blocks.*.up": RowwiseParallel(input_layouts=Replicate()),
        "blocks.*.down": ColwiseParallel(output_layouts=Replicate()),
        "lm_head": RowwiseParallel(input_layouts=Replicate(), use_local_output=False),
    }
    return parallelize_module(model, mesh, plan)  # type: ignore[return-value]


PLANS = {f.__name__: f for f in (sequences, no_sequences, across)}
MESHES = {"dp": ("dp",), "dp and tp": ("dp", "tp")}  # what wrap(mesh=) makes parallel itself


class Run:
    """A distiller and its optimizer, on this process or on all ranks of the group."""

    def __init__(self, plan: str, seed: int = 0) -> None:
        torch.manual_seed(1)
        teacher = LM(VOCABULARY, 24, 3)
        torch.manual_seed(seed)
        student = LM(VOCABULARY, 16, 2, bias=True)
        options: dict[str, Any] = {"task": "causal_lm", "label_weight": 0.5, "compile": False}
        self.plan, self.part = plan, slice(None)  # of the samples
        if plan in PLANS:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            student, teacher = (PLANS[plan](model, mesh) for model in (student, teacher))
        elif plan in MESHES:
            names = MESHES[plan]
            mesh = init_device_mesh("cpu", (2,) * len(names), mesh_dim_names=names)
            self.part = slice(mesh.get_local_rank("dp"), None, 2)
            options["mesh"] = mesh
        self.distiller: Distiller = fxdistill.wrap(student, teacher, MAPPING, **options)
        groups = self.distiller.param_groups()
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
        self.kinds: set[str] = set()  # of gradients, before they were clipped

    def backward(self, step: int) -> float:
        """Gradients of one batch, and its loss."""
        ids = torch.randint(VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(step))
        ids = ids[self.part]
        out = self.distiller(ids, labels=ids)
        self.optimizer.zero_grad()
        out.loss.backward()
        gradients = [p.grad for p in self.distiller.parameters()]
        self.kinds |= {str(getattr(g, "placements", "plain")) for g in gradients}
        return float(out.loss.detach())

    def clip(self) -> float:
        """The norm of the gradients before; one process does without the library."""
        if self.plan == "plain":
            return float(nn.utils.clip_grad_norm_(self.distiller.parameters(), MAX_NORM))
        return float(self.distiller.clip_grad_norm_(MAX_NORM))

    def steps(self, first: int, count: int) -> list[float]:
        """Losses and gradient norms of so many steps."""
        found = []
        for i in range(first, first + count):
            found += [self.backward(i), self.clip()]
            assert found[-1] > MAX_NORM
            self.optimizer.step()
        return found

    def state(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.distiller),
            "optimizer": get_optimizer_state_dict(self.distiller, self.optimizer),
        }

    def resume(self, path: str) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=path)
        set_model_state_dict(self.distiller, state["model"])
        set_optimizer_state_dict(self.distiller, self.optimizer, state["optimizer"])


def close(found: list[float], wanted: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=0)


def three_steps(rank: int) -> None:
    alone = Run("plain")
    wanted = alone.steps(0, 3)
    for plan in (*PLANS, "dp"):
        found = Run(plan)
        close(found.steps(0, 3), wanted)
        assert ("(Partial(sum),)" in found.kinds) == (plan == "sequences"), found.kinds
        assert "plain" in found.kinds
        pairs = zip(found.distiller.parameters(), alone.distiller.parameters(), strict=True)
        for p, q in pairs:
            assert (whole(p) - q).norm() <= 1e-5 * q.norm(), (plan, q.shape)


@pytest.mark.slow
def test_clipped_steps_are_those_of_one_device() -> None:
    run(2, three_steps)


# ---------------------------------------------------------------------- checkpoints


def saved(rank: int, path: str) -> list[float]:
    """Four steps; a checkpoint and an export are of the second one's end."""
    first = Run("sequences")
    found = first.steps(0, 2)
    first.optimizer.zero_grad()
    dcp.save(first.state(), checkpoint_id=path)
    student = first.distiller.student
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    export = get_model_state_dict(student, options=options)
    logits = whole(student(torch.arange(10)[None])).detach()
    assert bool(export) == (rank == 0)  # the others have no copy
    if rank == 0:
        torch.save({"student": export, "logits": logits}, f"{path}/export.pt")
    return found + first.steps(2, 2)


def resumed(rank: int, path: str, plans: tuple[str, ...], wanted: list[float]) -> None:
    for plan in plans:
        other = Run(plan, seed=5)
        other.resume(path)
        close(other.steps(2, 2), wanted)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[float]]:
    """Made on two ranks; where it is, and the run that went on."""
    path = str(tmp_path_factory.mktemp("run") / "checkpoint")
    return path, run(2, saved, path)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "plans"), [(4, ("no_sequences", "dp and tp")), (2, ("across", "dp"))]
)
def test_a_run_is_resumed_on_other_ranks_and_plans(
    checkpoint: tuple[str, list[float]], ranks: int, plans: tuple[str, ...]
) -> None:
    path, found = checkpoint
    run(ranks, resumed, path, plans, found[4:])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # as is meant
def test_a_run_is_resumed_and_exported_to_one_process(checkpoint: tuple[str, list[float]]) -> None:
    path, found = checkpoint
    close(found, Run("plain").steps(0, 4))
    resumed(0, path, ("plain",), found[4:])
    export = torch.load(f"{path}/export.pt")
    student = LM(VOCABULARY, 16, 2, bias=True)
    student.load_state_dict(export["student"], strict=True)
    logits = student(torch.arange(10)[None])
    torch.testing.assert_close(logits, export["logits"], rtol=1e-5, atol=1e-5)


def test_names_in_a_checkpoint() -> None:
    distiller = Run("plain").distiller
    student = {f"student.{name}" for name in distiller.student.state_dict()}
    projections = {f"projections.{name}" for name in distiller.projections.state_dict()}
    assert projections
    names = set(distiller.state_dict())
    assert names == set(get_model_state_dict(distiller)) == student | projections
