"""Losses of relations and contrast against loops over samples, their limits and identities."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fxdistill import errors, losses
from fxdistill.losses import angles

F64 = torch.float64
WEIGHTS = (None, [1.0, 1.0, 0.0, 1.0, 1.0], [0.5, 2.0, 0.0, 1.0, 3.0])


def pair(batch: int = 5, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    s = torch.randn(batch, 7, dtype=dtype, requires_grad=True)
    return s, torch.randn(batch, 4, dtype=dtype)


def weighted(values: dict[tuple[int, ...], Tensor], w: Tensor) -> Tensor:
    """Σ w·value / Σ w, where a tuple of samples weighs the product of their weights."""
    total = sum(float(w[list(of)].prod()) for of in values)
    return sum(w[list(of)].prod() * value for of, value in values.items()) / total


def by_pairs(h: Tensor) -> list[tuple[int, int]]:
    return list(itertools.product(range(len(h)), repeat=2))


def gram(s: Tensor, t: Tensor, w: Tensor) -> Tensor:
    unit = []
    for h in (s, t):
        squares = sum(w[i] * w[j] * (h[i] @ h[j]) ** 2 for i, j in by_pairs(h))
        unit.append({(i, j): (h[i] @ h[j]) / (squares.sqrt() + 1e-8) for i, j in by_pairs(h)})
    return weighted({of: (unit[0][of] - unit[1][of]) ** 2 for of in unit[0]}, w)


def distance_wise(s: Tensor, t: Tensor, w: Tensor, by: str = "mean") -> Tensor:
    unit = []
    for h in (s, t):
        far = {(i, j): (h[i] - h[j]).norm() for i, j in by_pairs(h) if i != j}
        kept = [value for (i, j), value in far.items() if w[i] * w[j]]
        size = weighted(far, w) if by == "mean" else max(kept)
        unit.append({of: far[of] / size if of in far else h.sum() * 0 for of in by_pairs(h)})
    return weighted({of: F.huber_loss(unit[0][of], unit[1][of]) for of in unit[0]}, w)


def angle_wise(s: Tensor, t: Tensor, w: Tensor) -> Tensor:
    found = {}
    for i, j, k in itertools.permutations(range(len(s)), 3):
        cosines = [F.cosine_similarity(h[i] - h[j], h[k] - h[j], dim=0) for h in (s, t)]
        found[i, j, k] = F.huber_loss(*cosines)
    return weighted(found, w)


def rows(s: Tensor, t: Tensor, w: Tensor) -> Tensor:
    found = []
    for h in (s, t):
        each = {}
        for i in range(len(h)):
            size = sum(w[k] * (h[i] @ h[k]) ** 2 for k in range(len(h))).sqrt()
            each.update({(i, j): (h[i] @ h[j]) / size for j in range(len(h))})
        found.append(each)
    return weighted({of: (found[0][of] - found[1][of]) ** 2 for of in found[0]}, w)


def cosines(s: Tensor, t: Tensor, w: Tensor) -> Tensor:
    gaps = {
        (i, j): F.cosine_similarity(s[i], s[j], dim=0) - F.cosine_similarity(t[i], t[j], dim=0)
        for i, j in by_pairs(s)
    }
    return weighted({of: gap**2 for of, gap in gaps.items()}, w)


CASES = {
    "gram": (losses.gram, gram),
    "distance_wise": (losses.distance_wise, distance_wise),
    "distance_wise/max": (
        lambda s, t, w: losses.distance_wise(s, t, w, normalize="max"),
        lambda s, t, w: distance_wise(s, t, w, "max"),
    ),
    "angle_wise": (losses.angle_wise, angle_wise),
    "similarity_preserving": (losses.similarity_preserving, rows),
    "similarity_preserving/cosine": (
        lambda s, t, w: losses.similarity_preserving(s, t, w, form="cosine"),
        cosines,
    ),
}
RELATIONS = {name.partition("/")[0]: loss for name, (loss, _) in CASES.items() if "/" not in name}


@pytest.mark.parametrize("weights", WEIGHTS, ids=("alike", "some", "numbers"))
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_loops_over_samples(name, weights):
    loss, oracle = CASES[name]
    s, t = pair()
    w = None if weights is None else torch.tensor(weights, dtype=F64)
    found = loss(s, t, w)
    want = oracle(s, t, torch.ones(5, dtype=F64) if w is None else w)
    torch.testing.assert_close(found, want)
    for ours, theirs in zip(*(torch.autograd.grad(x, s) for x in (found, want)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_both_sides_are_those_of_differences(name):
    s, t = pair(4)
    t.requires_grad_()
    w = torch.tensor([1.0, 0.5, 0.0, 2.0], dtype=F64)
    assert torch.autograd.gradcheck(lambda s, t: CASES[name][0](s, t, w), (s, t))


@pytest.mark.parametrize("name", CASES)
def test_relations_do_not_see_what_does_not_change_them(name):
    """Rotations of either side change no relation; nor does the order of the samples."""
    loss, (s, t) = CASES[name][0], pair()
    rotation, _ = torch.linalg.qr(torch.randn(7, 7, dtype=F64))
    order = torch.randperm(5)
    want = loss(s, t, None)
    torch.testing.assert_close(loss(s @ rotation, t, None), want)
    torch.testing.assert_close(loss(s[order], t[order], None), want)
    torch.testing.assert_close(loss(t * 3, t, None), torch.zeros((), dtype=F64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "kind", ["equal", "zero", "two in one place", "large", "one", "two", "none"]
)
def test_awkward_samples_have_finite_values_and_gradients(name, kind):
    s, t = (x.detach().clone() for x in pair())
    w = torch.zeros(5, dtype=F64) if kind == "none" else None
    if kind == "equal":
        s[:], t[:] = s[0].clone(), t[0].clone()
    elif kind == "zero":
        s[:2], t[1:3] = 0, 0
    elif kind == "two in one place":
        s[1], t[2] = s[0].clone(), t[3].clone()
    elif kind == "large":
        s, t = s * 1e4, t * 1e-4
    elif kind in ("one", "two"):
        s, t = s[: 1 + (kind == "two")].clone(), t[: 1 + (kind == "two")]
    elif kind == "none":
        s[:] = torch.nan
    s.requires_grad_()
    loss = CASES[name][0](s, t, w)
    (gradient,) = torch.autograd.grad(loss, s)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    if kind == "none" or (kind == "one" and "wise" in name) or (kind == "two" and "angle" in name):
        assert loss == 0
        assert (gradient == 0).all()


@pytest.mark.parametrize("name", RELATIONS)
def test_samples_that_do_not_count_may_be_anything(name):
    s, t = pair()
    w = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    kept = w != 0
    want = RELATIONS[name](s[kept], t[kept], None)
    with torch.no_grad():
        s[~kept], t[~kept] = torch.nan, torch.inf
    found = RELATIONS[name](s, t, w)
    (gradient,) = torch.autograd.grad(found, s)
    torch.testing.assert_close(found, want)
    assert (gradient[~kept] == 0).all()


@pytest.mark.parametrize("name", [*RELATIONS, "info_nce"])
def test_tokens_and_maps_are_reduced_to_samples(name):
    loss = getattr(losses, name)
    s, t = torch.randn(5, 3, 4, dtype=F64), torch.randn(5, 3, 4, dtype=F64)
    w = torch.tensor([[1.0, 2, 0], [0, 0, 0], [1, 1, 1], [0, 3, 1], [0.5, 0, 0]], dtype=F64)
    pooled = [(w[:, :, None] * x).sum(1) / w.sum(1).clamp_min(1e-9)[:, None] for x in (s, t)]
    some = w.sum(1) != 0
    torch.testing.assert_close(loss(s, t, w), loss(*(x[some] for x in pooled)))
    torch.testing.assert_close(loss(s, t, None), loss(s.mean(1), t.mean(1)))
    s, t = torch.randn(5, 4, 2, 3, dtype=F64), torch.randn(5, 4, 2, 3, dtype=F64)
    torch.testing.assert_close(loss(s, t), loss(s.mean((2, 3)), t.mean((2, 3))))
    inside = torch.rand(5, 2, 3, dtype=F64)
    means = [(x * inside[:, None]).sum((2, 3)) / inside.sum((1, 2))[:, None] for x in (s, t)]
    torch.testing.assert_close(loss(s, t, inside), loss(*means))


def test_angles_in_several_blocks_are_those_in_one(monkeypatch):
    s, t = pair(9)
    want = losses.angle_wise(s, t)
    (by_s,) = torch.autograd.grad(want, s)
    monkeypatch.setattr(angles, "BLOCK", 2 * 9 * 9)
    torch.testing.assert_close(losses.angle_wise(s, t), want)
    torch.testing.assert_close(torch.autograd.grad(losses.angle_wise(s, t), s)[0], by_s)


@pytest.mark.parametrize("needs", ["", "s", "st"])
def test_flops_of_angles_are_those_of_their_products(needs):
    s, t = (x.detach() for x in pair())
    with FlopCounterMode(display=False) as counter:
        angles._angle_wise._init_fn(s, t, torch.ones(5, dtype=F64), needs)
    assert angles.angle_flops(s, t, torch.ones(5), needs) == counter.get_total_flops()


def test_angles_have_no_second_derivative():
    s, t = pair()
    with pytest.raises(errors.StepError, match="angle_wise forms its gradients in the forward"):
        torch.autograd.grad(losses.angle_wise(s, t), s, create_graph=True)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS, ids=("alike", "some", "numbers"))
def test_info_nce_is_the_cross_entropy_of_each_sample_among_those_that_count(weights, symmetric):
    s = torch.randn(5, 4, dtype=F64, requires_grad=True)
    t = torch.randn(5, 4, dtype=F64)
    w = torch.ones(5, dtype=F64) if weights is None else torch.tensor(weights, dtype=F64)
    kept = (w != 0).nonzero().flatten()
    a, b = (F.normalize(x[kept], dim=-1) for x in (s, t))
    logits, target = a @ b.T / 0.5, torch.arange(len(kept))
    each = F.cross_entropy(logits, target, reduction="none")
    if symmetric:
        each = (each + F.cross_entropy(logits.T, target, reduction="none")) / 2
    want = (each * w[kept]).sum() / w.sum()
    given = None if weights is None else w
    found = losses.info_nce(s, t, given, symmetric=symmetric)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, s)[0] for x in (found, want)))


def test_info_nce_of_one_sample_is_zero_and_of_n_alike_is_log_n():
    s = torch.randn(1, 4, requires_grad=True)
    assert losses.info_nce(s, torch.randn(1, 4)) == 0
    alike = torch.ones(6, 4)
    torch.testing.assert_close(losses.info_nce(alike, alike), torch.tensor(6.0).log())
    zeros = torch.zeros(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.info_nce(zeros, torch.zeros(3, 4)), zeros)
    assert gradient.isfinite().all()


def crd(s, t):
    return losses.CRD(width=3, size=4, in_batch=True)(s, t)


@pytest.mark.parametrize(
    ("loss", "beside_zeros"),
    [
        (losses.gram, 1),
        (losses.similarity_preserving, 1),
        (CASES["similarity_preserving/cosine"][0], 1),
        (losses.distance_wise, 0),
        (CASES["distance_wise/max"][0], 0),
        (losses.angle_wise, 0),
        (losses.info_nce, 0),
        (crd, 0),
    ],
)
def test_one_sample_has_a_value(loss, beside_zeros):
    """It is like itself in both models, unless it is a vector of zeros in one of them."""
    given = {} if loss is crd else {"w": None}
    s = torch.randn(1, 4, dtype=torch.float32 if loss is crd else F64, requires_grad=True)
    for t, want in ((torch.randn_like(s), 0), (torch.zeros_like(s), beside_zeros)):
        found = loss(s, t, *given.values())
        torch.testing.assert_close(float(found.detach()), float(want), atol=1e-7, rtol=1e-7)
        assert torch.autograd.grad(found, s)[0].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda s, t: losses.distance_wise(s, t, normalize="sum"), errors.OptionError, "'max'"),
        (lambda s, t: losses.similarity_preserving(s, t, form="x"), errors.OptionError, "'rows'"),
        (lambda s, t: losses.gram(s, t[:2]), errors.ShapeError, "5 samples and the teacher 2"),
        (lambda s, t: losses.gram(s[0], t), errors.ShapeError, "has no samples"),
        (
            lambda s, t: losses.gram(s, t, torch.ones(5, 2)),
            errors.ShapeError,
            "leave no width|lead",
        ),
        (lambda s, t: losses.info_nce(s, t), errors.ShapeError, "one width, not 7 and 4"),
    ],
)
def test_what_cannot_be_compared_is_an_error(call, error, says):
    with pytest.raises(error, match=says):
        call(*pair())


@pytest.mark.parametrize("weights", [[1e4, 1, 1, 1], [1, 1e-4, 1e-4, 1e-4]], ids=str)
def test_angles_of_very_unequal_weights_are_exact(weights):
    s, t = (x.detach().float() for x in pair(4))
    w = torch.tensor(weights)
    want = angle_wise(s.double(), t.double(), w.double())
    torch.testing.assert_close(losses.angle_wise(s, t, w).double(), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", [*RELATIONS, "info_nce"])
def test_losses_are_formed_in_full_precision_under_autocast(name):
    s, t = (torch.randn(5, 8, requires_grad=name == "none") for _ in range(2))
    want = getattr(losses, name)(s, t)
    with torch.autocast("cpu", torch.bfloat16):
        found = getattr(losses, name)(s, t)
    assert found.dtype == torch.float32
    assert found == want
