"""For test_sharded_matrix.py: cases, losses from their formulas in float64, and placed tensors."""

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from fxdistill import losses

Formula = Callable[[Tensor, Tensor], Tensor]  # of [N, D] and [N, D] (or labels [N]), to [N]
SHAPES = ((4, 8, 8), (3, 7, 10), (1, 5, 3))  # even; uneven; less than one for each rank
WEIGHTS = ("none", "some", "zero")


def smooth(s: Tensor, t: Tensor, beta: float = 1.0) -> Tensor:
    d = (s - t).abs()
    return torch.where(d < beta, d * d / (2 * beta), d - beta / 2).mean(-1)


def cosine(s: Tensor, t: Tensor) -> Tensor:
    return 1 - (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))


def classes(s: Tensor, t: Tensor) -> Tensor:
    p, q = torch.sigmoid(t / 2), torch.sigmoid(s / 2)
    return -4 * (p * q.log() + (1 - p) * (1 - q).log()).mean(-1)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    if beta in (0, 1):
        return kl(q, p) if beta else kl(p, q)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def divergence(of: Formula, tau: float, s: Tensor, t: Tensor) -> Tensor:
    return tau**2 * of((t / tau).softmax(-1), (s / tau).softmax(-1))


def variation(tau: float, s: Tensor, t: Tensor) -> Tensor:
    return ((s / tau).softmax(-1) - (t / tau).softmax(-1)).clamp(min=0).sum(-1)


def squares(tau: float, s: Tensor, t: Tensor) -> Tensor:
    return (s - t).square().mean(-1)


def sigmoids(tau: float, s: Tensor, t: Tensor) -> Tensor:
    q, p = (s / tau).sigmoid(), (t / tau).sigmoid()
    return tau**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean(-1)


def label_loss(s: Tensor, y: Tensor, smoothing: float, z_loss: float) -> Tensor:
    surprise = -s.log_softmax(-1)
    values = (1 - smoothing) * surprise.gather(-1, y[:, None])[:, 0]
    return values + smoothing * surprise.mean(-1) + z_loss * s.exp().sum(-1).log() ** 2


FEATURES: dict[str, tuple[Any, Formula]] = {
    "mse": (losses.mse, lambda s, t: (s - t).square().mean(-1)),
    "l2": (losses.l2, lambda s, t: (s - t).norm(dim=-1)),
    "l1": (losses.l1, lambda s, t: (s - t).abs().mean(-1)),
    "smooth_l1": (losses.smooth_l1, smooth),
    "smooth_l1/0.5": (
        functools.partial(losses.smooth_l1, beta=0.5),
        functools.partial(smooth, beta=0.5),
    ),
    "cosine": (losses.cosine, cosine),
    "fitnet": (losses.fitnet, lambda s, t: (unit(s) - unit(t)).square().mean(-1)),
    "detection_classification": (losses.detection_classification, classes),
}
VECTORS = ("l2", "cosine", "fitnet")  # of these, each place of a map has a value of its own
DIVERGENCES: dict[str, tuple[Any, Formula]] = {
    "forward_kl": (losses.forward_kl, kl),
    "reverse_kl": (losses.reverse_kl, lambda p, q: kl(q, p)),
    "soft_cross_entropy": (losses.soft_cross_entropy, lambda p, q: -(p * q.log()).sum(-1)),
} | {
    f"jsd/{b}": (functools.partial(losses.jsd, beta=b), functools.partial(jsd, beta=b))
    for b in (0.5, 0.3, 0.0, 1.0)
}
AT_TAU: dict[str, tuple[Any, Callable[[float, Tensor, Tensor], Tensor]]] = {
    "total_variation": (losses.total_variation, variation),
    "mse_logits": (losses.mse_logits, squares),
    "sigmoid_kl": (losses.sigmoid_kl, sigmoids),
} | {
    name: (loss, functools.partial(divergence, formula))
    for name, (loss, formula) in DIVERGENCES.items()
}
LOGITS: dict[str, tuple[Any, Formula]] = {
    f"{name}/{tau!r}": (
        functools.partial(loss, temperature=tau),
        functools.partial(formula, float(tau)),
    )
    for (name, (loss, formula)), tau in product(
        AT_TAU.items(), (1.0, 2.0, torch.tensor(1.0), torch.tensor(2.0))
    )
}
LABELS: dict[str, tuple[Any, Formula]] = {
    f"cross_entropy/{e}/{z}": (
        functools.partial(losses.cross_entropy, label_smoothing=e, z_loss=z),
        functools.partial(label_loss, smoothing=e, z_loss=z),
    )
    for e, z in product((0.0, 0.1), (0.0, 0.01))
}
LOSSES = FEATURES | LOGITS | LABELS


class Case(NamedTuple):
    """What one device sees."""

    loss: str
    shape: tuple[int, ...]
    weights: str = "none"
    lead: int = 2  # the axes of the weights
    dtype: torch.dtype = torch.float32
    equal: bool = False  # the student is the teacher
    both: bool = False  # the teacher has a gradient too


def cases(
    names: Sequence[str], shapes: Any = SHAPES, weights: Any = WEIGHTS, **of: Any
) -> list[Case]:
    return [Case(*x, **of) for x in product(names, shapes, weights)]


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    """Eighths, for which sums of addends are exact, in bfloat16 too."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g).clamp(-3, 3) * 8).round() / 8


@functools.cache
def operands(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """Student, teacher (or labels) and weights; what does not count is not finite."""
    student, weights = numbers(case.shape, 1), None
    teacher = student.clone() if case.equal else numbers(case.shape, 2)
    if case.weights != "none":
        weights = numbers(case.shape[: case.lead], 3).abs() + 0.125
        weights.flatten()[slice(1, None, 3) if case.weights == "some" else slice(None)] = 0
        student[weights == 0] = torch.nan
        teacher[weights == 0] = torch.inf
    if case.loss in LABELS:
        g = torch.Generator().manual_seed(4)
        teacher = torch.randint(case.shape[-1], case.shape[:-1], generator=g)
        teacher.flatten()[2::4] = -100
        student[teacher == -100] = torch.nan
        return student.to(case.dtype), teacher, weights
    return student.to(case.dtype), teacher.to(case.dtype), weights


@functools.cache
def wanted(case: Case) -> list[Tensor]:
    """The loss and the gradients of 1.5 times the loss, by the formula."""
    s, t, weights = operands(case)
    vectors = case.loss in VECTORS
    rows = case.lead if weights is not None else s.ndim - 1 if s.ndim < 4 else 1
    w = (torch.ones(case.shape[:rows]) if weights is None else weights).double()
    as_map = vectors and s.ndim == 4 and rows == 1
    if vectors:  # the weight of a row is shared by its places
        shape = [*s.shape[:1], *s.shape[2:]] if as_map else list(s.shape[:-1])
        per_place = w.flatten() / (torch.Size(shape).numel() / w.numel())
        w = per_place.repeat_interleave(torch.Size(shape).numel() // w.numel())
    w = w.flatten()
    labelled = case.loss in LABELS
    if labelled:
        w = w * (t.flatten() != -100)
    kept = w != 0
    given = [x if x is t and labelled else x.to(torch.float64, copy=True) for x in (s, t)]
    learnt = [x.requires_grad_() for x in (given if case.both else given[:1])]
    of_rows = [x.movedim(1, -1) if as_map else x for x in given]
    a = of_rows[0].reshape(len(w), -1)[kept]
    b = t.flatten()[kept] if labelled else of_rows[1].reshape(len(w), -1)[kept]
    values = LOSSES[case.loss][1](a, b)
    loss = (values * w[kept]).sum() / (w.sum() if kept.any() else 1)
    return [loss.detach(), *torch.autograd.grad(loss * 1.5, learnt)]


def placements(ndim: int, dims: int) -> list[tuple[Any, ...]]:
    """All for a mesh of ``dims`` dimensions, but those that shard one axis twice."""
    each = [Replicate(), *(Shard(i) for i in range(ndim)), Partial()]
    return [p for p in product(each, repeat=dims) if not (dims == 2 and p[0] == p[1] in each[1:-1])]


def others(of: tuple[Any, ...], ndim: int) -> Iterator[tuple[Any, ...]]:
    """The same placement, Replicate, and other shards."""
    shards = [Shard((p.dim + 1) % ndim if p.is_shard() else ndim - 1) for p in of]
    if shards[0] == shards[-1]:
        shards[1:] = [Replicate()] * len(shards[1:])
    yield from dict.fromkeys((of, (Replicate(),) * len(of), tuple(shards)))


def as_gradient(of: tuple[Any, ...]) -> list[Any]:
    """How the gradient of what is placed so lies on each rank."""
    return [Replicate() if p.is_partial() else p for p in of]


def piece(full: Tensor, mesh: DeviceMesh, of: tuple[Any, ...]) -> Tensor:
    return distribute_tensor(full, mesh, as_gradient(of), src_data_rank=None).to_local()


def placed(
    full: Tensor, mesh: DeviceMesh, of: tuple[Any, ...], seed: int
) -> tuple[Tensor, DTensor]:
    """A leaf with what this rank holds, and the DTensor made from it."""
    mine = full
    for dim, p in enumerate(of):
        if p.is_partial():
            rest = [numbers(full.shape, seed + i).to(full.dtype) for i in range(1, mesh.size(dim))]
            addends = [*rest, mine - sum(rest)]
            mine = addends[mesh.get_local_rank(dim)]
    local = piece(mine, mesh, of).clone()
    if local.is_floating_point():
        local.requires_grad_()
    whole = DTensor.from_local(
        local, mesh, of, run_check=False, shape=full.shape, stride=full.stride()
    )
    return local, whole
