"""Losses of DTensors against their formulas: every loss, placement, size, weighting and mesh."""

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

import matrix
from matrix import FEATURES, LABELS, LOGITS, LOSSES, SHAPES, Case, cases
from processes import run

pytestmark = pytest.mark.slow

Placed = tuple[Case, tuple[Any, ...], tuple[Any, ...]]  # with those of student and teacher
UNEVEN = SHAPES[1]
# 0 where student and teacher are equal
EXACT = [name for name in FEATURES if name not in ("cosine", "detection_classification")]
EACH = (Replicate(), Shard(0), Shard(1), Shard(2), Partial())
PRECISION = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}


def far(what: str, found: Tensor, want: Tensor, scale: Tensor, relative: float) -> list[str]:
    """A complaint where ``found`` is not ``want``, a part of ``scale``."""
    if found.shape != want.shape:
        return [f"{what} of shape {tuple(found.shape)}, not {tuple(want.shape)}"]
    bound = float(relative * scale.norm() + relative / 10 * scale.abs().max())
    error = float((found.double() - want).norm())
    return [] if error <= bound else [f"{what} is off by {error:.2e} (bound {bound:.2e})"]


def complaints(case: Case, found: list[Tensor]) -> list[str]:
    """What is wrong with the loss, and with the whole gradients."""
    relative, wide = PRECISION[case.dtype], torch.promote_types(case.dtype, torch.float32)
    loss, want = found[0], matrix.wanted(case)
    wrong = [] if type(loss) is Tensor and loss.shape == () else [f"loss is {loss!r}"]
    if loss.dtype != wide:
        wrong.append(f"loss is of {loss.dtype}")
    bound = min(relative, 1e-5) * (want[0].abs() + 0.01 * (want[0] != 0))  # 0 is exactly 0
    if not abs(loss.double() - want[0]) <= bound:
        wrong.append(f"loss {float(loss):.9g}, not {float(want[0]):.9g}")
    for name, a, b in zip(("student", "teacher"), found[1:], want[1:], strict=False):
        if a.dtype != case.dtype:
            wrong.append(f"gradient of {name} is of {a.dtype}")
        wrong += far(f"gradient of {name}", a, b, b, relative)
    return wrong


def measure(x: Placed, mesh: DeviceMesh, function: Any = None) -> tuple[float, list[str]]:
    """The loss, and what is wrong with it and its gradients, whole and as this rank holds them."""
    case, *of = x
    student, teacher, weights = matrix.operands(case)
    pairs = [matrix.placed(student, mesh, of[0], 10)]
    if case.loss not in LABELS:
        pairs.append(matrix.placed(teacher, mesh, of[1], 20))
        teacher = pairs[1][1] if case.both else pairs[1][1].detach()
    learnt = pairs[: 1 + case.both]
    loss = (function or LOSSES[case.loss][0])(learnt[0][1], teacher, weights=weights)
    inputs = [x for pair in learnt for x in pair]
    gradients = torch.autograd.grad(loss * 1.5, inputs)
    locals_, wholes = gradients[::2], [g.full_tensor() for g in gradients[1::2]]
    wrong = complaints(case, [loss.detach(), *wholes])
    for found, want, at in zip(locals_, matrix.wanted(case)[1:], of, strict=False):
        mine = matrix.piece(want, mesh, at)
        wrong += far(f"local gradient at {at}", found, mine, want, PRECISION[case.dtype])
    return loss.item(), wrong


def tried(all_of: Iterable[Placed], mesh: DeviceMesh, **options: Any) -> tuple[list[float], Any]:
    """The losses, and the cases that are wrong, each with what is."""
    values, failures = [], []
    for x in all_of:
        try:
            value, wrong = measure(x, mesh, **options)
        except Exception as e:
            value, wrong = 0.0, [f"{type(e).__name__}: {str(e)[:300]}"]
            if "imed out" in str(e):  # the ranks are no longer at the same case
                return values, [*failures, f"{x}: {wrong}"]
        values.append(value)
        if wrong:
            failures.append(f"{x}: {'; '.join(wrong)}")
    return values, failures


def settle(results: list[tuple[list[float], list[str]]]) -> None:
    """Nothing failed on any rank, and all ranks have the same losses."""
    failures = [f"rank {rank}, {f}" for rank, (_, wrong) in enumerate(results) for f in wrong]
    count = len(results[0][0])
    assert not failures, f"{len(failures)} of {count} cases x ranks:\n" + "\n".join(failures[:400])
    assert all(values == results[0][0] for values, _ in results), "losses differ between ranks"


def mesh_of(*sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "tp")[-len(sizes) :])


def on_each(of: Iterable[Case], dims: int = 1, teacher: str = "others") -> list[Placed]:
    """Each case with all placements of the student, and those of the teacher."""
    found = []
    for case in of:
        every = matrix.placements(len(case.shape), dims)
        for s in every:
            others = list(matrix.others(s, len(case.shape)))
            ts = {"all": every, "others": others, "same": [s]}[teacher]
            found += [(case, s, t) for t in ts]
    return found


def all_sizes(names: list[str], ranks: int) -> list[Case]:
    """The product of sizes and weights; on 4 ranks, which are slow, less of what counts nothing."""
    if ranks == 2:
        return cases(names)
    return cases(names, weights=("some",)) + cases(names, [UNEVEN], ("none", "zero"))


def features(ranks: int) -> list[Placed]:
    names = list(FEATURES)
    maps = ((4, 4, 8, 4), (3, 5, 2, 7))
    of_sizes = on_each(all_sizes(names, ranks), teacher="all" if ranks == 2 else "others")
    if ranks == 4:  # they have shards of other sizes, some of them empty; the rest is as on two
        return of_sizes + on_each(cases(names, maps[1:], ("some",), lead=1))
    return [
        *of_sizes,
        *on_each(cases(names, [UNEVEN], ("some", "zero"), both=True)),
        *on_each(cases(EXACT, [UNEVEN], ("none", "some"), equal=True)),
        *on_each(cases(names, [UNEVEN], ("some",), dtype=torch.float64)),
        *on_each(cases(names, [UNEVEN], ("none",), dtype=torch.bfloat16)),
        # Maps [B, C, H, W]; heads behind a sequence; [B, D].
        *on_each(cases(names, maps, ("none",), lead=1)),
        *on_each(cases(names, maps[1:], ("some",), lead=1)),
        *on_each(cases(names, maps[1:], ("some",), lead=2)),
        *on_each(cases(names, [(3, 5)], ("none", "some"), lead=1)),
    ]


def logits(ranks: int) -> list[Placed]:
    """All temperatures on 2 ranks, and two of them on 4."""
    names = [*LOGITS, *LABELS]
    if ranks == 4:
        names = [n for n in names if not n.endswith(("/2.0", "/tensor(1.)"))]
    some = [*(n for n in LOGITS if n.endswith("/2.0")), *LABELS]
    return [
        *on_each(all_sizes(names, ranks), teacher="same"),
        *on_each(cases(some, [UNEVEN], ("some",))),
    ]


def grid() -> list[Placed]:
    names = list(FEATURES)
    uneven, even = cases(names, [UNEVEN], ("some",)), cases(names, SHAPES[:1], ("none",))
    return on_each(uneven, 2) + on_each(even, 2, "same")


def on_line(rank: int, ranks: int) -> Any:
    return tried(features(ranks) + logits(ranks), mesh_of(ranks))


def on_grid(rank: int) -> Any:
    return tried(grid(), mesh_of(2, 2))


def test_formulas() -> None:
    """The plain losses, by the same cases."""
    all_of = {case: None for x in (features(2), logits(2), grid()) for case, *_ in x}
    failures = []
    for case in all_of:
        student, teacher, weights = matrix.operands(case)
        given = [student.clone().requires_grad_(), teacher.clone()]
        learnt = [x.requires_grad_() for x in given] if case.both else given[:1]
        loss = LOSSES[case.loss][0](*given, weights=weights)
        found = [loss.detach(), *torch.autograd.grad(loss * 1.5, learnt)]
        failures += [f"{case}: {wrong}" for wrong in complaints(case, found)]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("ranks", [2, 4])
def test_line(ranks: int) -> None:
    settle(run(ranks, on_line, ranks))


def test_grid() -> None:
    settle(run(4, on_grid))


def compiled(rank: int) -> Any:
    values: list[float] = []
    failures: list[str] = []
    sample = [*product(("mse",), EACH), *product(("l2", "cosine"), EACH[3:])]
    for i, (name, at) in enumerate(sample):
        torch._dynamo.reset()
        loss = torch.compile(LOSSES[name][0], backend="aot_eager", fullgraph=True)
        case = Case(name, UNEVEN, ("some", "none")[i % 2])
        value, wrong = tried([(case, (at,), (at,))], mesh_of(2), function=loss)
        values += value
        failures += wrong
    return values, failures


def test_compiled() -> None:
    settle(run(2, compiled))


def counts(rank: int) -> Any:
    """The collectives where student and teacher agree: one all_reduce, of the sums of a token.

    Also along the width of l2 and cosine: with its sums whole, a rank has all of all tokens.
    """
    mesh, failures = mesh_of(2), []
    sample = cases(list(FEATURES), [UNEVEN], ("none", "some"))
    for case, at in product(sample, EACH[:4]):
        student, teacher, weights = matrix.operands(case)
        s, t = (matrix.placed(x, mesh, (at,), 0)[1].detach() for x in (student, teacher))
        with CommDebugMode() as forward:
            loss = LOSSES[case.loss][0](s.requires_grad_(), t, weights=weights)
        with CommDebugMode() as backward:
            loss.backward()
        found = [{str(k): n for k, n in c.get_comm_counts().items()} for c in (forward, backward)]
        once = {} if at == Replicate() else {"c10d_functional.all_reduce": 1}
        if found != [once, {}]:
            failures.append(f"{case} {at}: {found}, not {[once, {}]}")
    return [], failures


def test_counts() -> None:
    settle(run(2, counts))
