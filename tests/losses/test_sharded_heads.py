"""The fused head on a sharded vocabulary: loss and gradients of one device, on 2 and 4 ranks."""

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fxdistill import errors
from fxdistill.losses import jsd, vocab_loss
from processes import run

B, L, D, D_T = 2, 9, 12, 20
CASES: dict[str, dict[str, Any]] = {
    "forward_kl": {"label_weight": 0.7},
    "reverse_kl": {"divergence": "reverse_kl", "temperature": 2.0},
    "jsd": {"divergence": "jsd", "label_weight": 1.0, "temperature": 0.5},
    "jsd, beta": {"divergence": functools.partial(jsd, beta=0.2)},
    "jsd, its end": {"divergence": functools.partial(jsd, beta=1.0)},
    "soft": {"divergence": "soft_cross_entropy", "num_items": 30},
    "mix": {"divergence": {"forward_kl": 0.5, "jsd": 1.0, "sigmoid_kl": 2.0}, "temperature": 2.0},
    "variation": {"divergence": "total_variation", "temperature": 2.0, "vocab_size": 20},
    "squares": {"divergence": "mse_logits", "label_weight": 0.5, "vocab_size": 20},
    "sigmoids": {"divergence": "sigmoid_kl", "temperature": 0.5, "student_softcap": 3.0},
    "labels": {"divergence": None, "label_weight": 1.0, "label_smoothing": 0.1, "z_loss": 0.01},
    "curves": {"student_softcap": 3.0, "teacher_softcap": 5.0, "student_scale": 0.5},
    "columns": {"vocab_size": 20, "label_weight": 1.0},
    "chunks": {"chunk_tokens": 16, "label_weight": 1.0},
}


def operands(v: int, v_t: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, v, (B, L), generator=g)
    labels[0, :3] = -100
    weights = torch.rand(B, L, generator=g)
    weights[1, ::3] = 0
    return {
        "student_hidden": torch.randn(B, L, D, generator=g),
        "student_weight": torch.randn(v, D, generator=g) * 0.5,
        "student_bias": torch.randn(v, generator=g),
        "teacher_hidden": torch.randn(B, L, D_T, generator=g),
        "teacher_weight": torch.randn(v_t, D_T, generator=g) * 0.5,
        "teacher_bias": torch.randn(v_t, generator=g),
        "labels": labels,
        "weights": weights,
    }


LEARNT = ("student_hidden", "student_weight", "student_bias")


def sharded(x: dict[str, Tensor], mesh: Any, tokens: Any, vocabulary: Any) -> dict[str, Tensor]:
    placed = {}
    for name, value in x.items():
        if name in ("labels", "weights"):
            placed[name] = value
        else:
            by_token = name.endswith("hidden")
            placement = tokens if by_token else vocabulary
            placed[name] = distribute_tensor(value, mesh, [placement]).detach()
        if name in LEARNT:
            placed[name].requires_grad_()
    return placed


def alone(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: w.clone().requires_grad_() if k in LEARNT else w for k, w in x.items()}


def measured(x: dict[str, Tensor], options: dict[str, Any]) -> list[Tensor]:
    given = {k: v for k, v in x.items() if k in LEARNT}
    out = vocab_loss(**x, compile=False, **options)
    gradients = torch.autograd.grad(out.loss * 1.5, list(given.values()))
    whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
    return [out.loss.detach(), out.logits, out.labels, *whole]


def ruled_out_by_both(rank: int) -> None:
    """Biases of -inf, on both sides and on the teacher's alone: as one device, and no NaN."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    x = operands(31, 31)
    x["student_bias"][3] = -torch.inf
    x["teacher_bias"][[3, 7]] = -torch.inf
    for divergence in ("forward_kl", "total_variation", "mse_logits", "sigmoid_kl"):
        found = measured(sharded(x, mesh, Replicate(), Shard(0)), {"divergence": divergence})
        wanted = measured(alone(x), {"divergence": divergence})
        for a, b in zip(found, wanted, strict=True):
            assert b.isfinite().all()
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_entries_that_are_ruled_out() -> None:
    run(2, ruled_out_by_both)


def compare(case: str, v: int, v_t: int, mesh: Any, tokens: Any, vocabulary: Any) -> None:
    x = operands(v, v_t)
    options = CASES[case]
    found = measured(sharded(x, mesh, tokens, vocabulary), options)
    wanted = measured(alone(x), options)
    for a, b in zip(found, wanted, strict=True):
        bound = 1e-5 * b.norm() + 1e-6 * b.abs().max()
        assert (a - b).norm() <= bound, (case, v, v_t, tokens, float((a - b).norm()), bound)


def parity(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    for case in CASES:
        for tokens in (Replicate(), Shard(1)):
            # Even shards; uneven ones; a teacher that is padded; a vocabulary smaller than a rank.
            for v, v_t in ((32, 32), (31, 31), (31, 32), (32, 31)):
                compare(case, v, v_t, mesh, tokens, Shard(0))
    compare("forward_kl", 21, 21, mesh, Replicate(), Shard(0))
    if ranks == 4:  # two columns on each of three ranks, none on the fourth
        compare("forward_kl", 5, 5, mesh, Replicate(), Shard(0))
        compare("labels", 6, 6, mesh, Shard(1), Shard(0))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_parity_with_one_device(ranks: int) -> None:
    run(ranks, parity, ranks)


def many_tokens(rank: int) -> str:
    """Where tokens outnumber the vocabulary, weights are gathered instead."""
    from fxdistill.losses.fused.call import HeadSide
    from fxdistill.losses.fused.sharded_heads import sharded_heads_of

    mesh = init_device_mesh("cpu", (2,))
    g = torch.Generator().manual_seed(0)
    h = torch.randn(B, 64, D, generator=g)
    t = torch.randn(B, 64, D_T, generator=g)
    w, t_weight = (torch.randn(24, width, generator=g) for width in (D, D_T))
    labels = torch.randint(0, 24, (B, 64), generator=g)
    results = []
    for place in (lambda x, p: distribute_tensor(x, mesh, [p]), lambda x, p: x.clone()):
        x = {
            "student_hidden": place(h, Shard(1)).requires_grad_(),
            "student_weight": place(w, Shard(0)).requires_grad_(),
            "teacher_hidden": place(t, Shard(1)),
            "teacher_weight": place(t_weight, Shard(0)),
        }
        out = vocab_loss(**x, labels=labels, label_weight=1.0, compile=False)
        gradients = torch.autograd.grad(out.loss, [x["student_hidden"], x["student_weight"]])
        whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
        results.append([out.loss.detach(), out.logits, out.labels, *whole])
        if isinstance(x["student_weight"], DTensor):
            student = HeadSide(x["student_hidden"], x["student_weight"], None)
            layout = sharded_heads_of(
                student, HeadSide(x["teacher_hidden"], x["teacher_weight"], None)
            )
            assert layout.gathers_weights
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    return layout.how


@pytest.mark.slow
def test_weights_are_gathered_where_tokens_are_many() -> None:
    how = run(2, many_tokens)
    assert all("weights are gathered" in text for text in how)


class Traffic(TorchDispatchMode):
    """How many numbers each functional collective is given."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if func.namespace == "_c10d_functional" and not ("wait" in name or "wrap" in name):
            self.sent.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def traffic(rank: int) -> list[int]:
    """What crosses ranks in a step, in numbers; inside an operator a mode does not see it."""
    mesh = init_device_mesh("cpu", (2,))
    x = sharded(operands(1000, 1000), mesh, Replicate(), Shard(0))
    mode = Traffic()

    def counted(collective: Any, index: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            mode.sent.append(args[index].numel())
            return collective(*args, **kwargs)

        return call

    gather, reduce = dist.all_gather_into_tensor, dist.all_reduce
    dist.all_gather_into_tensor, dist.all_reduce = counted(gather, 1), counted(reduce, 0)
    with mode:
        out = vocab_loss(**x, label_weight=1.0, compile=False)
        out.loss.backward()
    return mode.sent


@pytest.mark.slow
def test_only_statistics_cross_ranks() -> None:
    """One chunk: 8 numbers a token gathered, 2 reduced; then the hidden state's gradient."""
    sent = run(2, traffic)[0]
    tokens = -(-B * L // 16) * 16
    assert sent == [8 * tokens, 2 * tokens, B * L * D]


def compiled(rank: int) -> None:
    """Under torch.compile, and with the parts of a chunk compiled."""
    mesh = init_device_mesh("cpu", (2,))
    x = sharded(operands(31, 31), mesh, Shard(1), Shard(0))
    options = {"label_weight": 1.0, "divergence": "jsd"}
    wanted = measured(x, options)
    given = [x[name] for name in LEARNT]

    def step(backend: str | None, compile: bool) -> list[Tensor]:
        def loss(x: dict[str, Tensor]) -> Tensor:
            return vocab_loss(**x, compile=compile, **options).loss

        fn = loss if backend is None else torch.compile(loss, backend=backend, fullgraph=True)
        total = fn(x)
        gradients = torch.autograd.grad(total * 1.5, given)
        return [total.detach(), *(g.full_tensor() for g in gradients)]

    for backend, compile in ((None, True), ("aot_eager", False)):
        found = step(backend, compile)
        for a, b in zip(found, [wanted[0], *wanted[3:]], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compiled_forms() -> None:
    run(2, compiled)


def ruled_out(rank: int) -> None:
    """A column at -inf on one rank, with and without a sum over columns."""
    mesh = init_device_mesh("cpu", (2,))
    for options in ({}, {"label_weight": 1.0}, {"divergence": "reverse_kl", "label_weight": 1.0}):
        x = operands(32, 32)
        for side in ("student", "teacher"):
            x[f"{side}_bias"][3] = -torch.inf
        x["labels"][x["labels"] == 3] = 4
        found = measured(sharded(x, mesh, Replicate(), Shard(0)), options)
        wanted = measured(alone(x), options)
        for a, b in zip(found, wanted, strict=True):
            assert b.isfinite().all()
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_columns_that_are_ruled_out() -> None:
    run(2, ruled_out)


def one_side(rank: int) -> None:
    """One tower is sharded, the other is whole on every rank."""
    mesh = init_device_mesh("cpu", (2,))
    x = alone(operands(31, 31))
    wanted = measured(x, {})
    placed = sharded(operands(31, 31), mesh, Replicate(), Shard(0))
    for whole in ("student", "teacher"):
        mixed = {k: w if k.startswith(whole) else placed[k] for k, w in x.items()}
        for a, b in zip(measured(mixed, {}), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_one_side_is_whole() -> None:
    run(2, one_side)


def rejected(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    x = {k: v for k, v in operands(32, 32).items() if not k.endswith("bias")}
    with pytest.raises(errors.ShapeError, match="one of its dimensions"):
        vocab_loss(**sharded(x, mesh, Replicate(), Shard(1)), compile=False)
    with pytest.raises(errors.ShapeError, match="tokens sharded"):
        vocab_loss(**sharded(x, mesh, Shard(2), Shard(0)), compile=False)
    with pytest.raises(errors.VocabularyError, match="pad the smaller one"):
        vocab_loss(**sharded(operands(32, 28), mesh, Replicate(), Shard(0)), compile=False)
    plain = {**x, "student_hidden": distribute_tensor(x["student_hidden"], mesh, [Replicate()])}
    with pytest.raises(errors.ShapeError, match="weights of the heads are not"):
        vocab_loss(**plain, compile=False)
    out_of_range = {**x, "labels": x["labels"] + 32}
    with pytest.raises(RuntimeError, match="outside of the student's vocabulary"):
        vocab_loss(**sharded(out_of_range, mesh, Replicate(), Shard(0)), compile=False)


@pytest.mark.slow
def test_what_does_not_fit_is_told() -> None:
    run(2, rejected)
