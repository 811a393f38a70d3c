"""Total variation, squares of logits and sigmoids: closed forms, identities, limits, extremes."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence

import fxdistill
from fxdistill import errors, losses
from fxdistill.losses import vocab_loss, vocab_loss_topk
from heads import Model, batch

F64 = torch.float64
NAMES = ("total_variation", "mse_logits", "sigmoid_kl")
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], dtype=F64)


def loss_of(name: str, s: Tensor, t: Tensor, tau: float = 1.0, weights: Any = None) -> Tensor:
    return getattr(losses, name)(s, t, temperature=tau, weights=weights)


def gradient(name: str, s: Tensor, t: Tensor, tau: float = 1.0, weights: Any = None) -> Tensor:
    s = s.detach().clone().requires_grad_()
    return torch.autograd.grad(loss_of(name, s, t, tau, weights), s)[0]


def closed(name: str, s: Tensor, t: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """The value of each token and its gradient, in plain probabilities."""
    size = s.shape[-1]
    if name == "mse_logits":
        return (s - t).square().mean(-1), 2 * (s - t) / size
    if name == "sigmoid_kl":
        ours, theirs = Bernoulli(logits=s / tau), Bernoulli(logits=t / tau)
        value = tau**2 * kl_divergence(theirs, ours).mean(-1)
        return value, tau * (ours.probs - theirs.probs) / size
    q, p = (s / tau).softmax(-1), (t / tau).softmax(-1)
    jacobian = torch.diag_embed(q) - q[..., :, None] * q[..., None, :]
    by_q = torch.where(q > p, 0.5, -0.5).to(q.dtype)
    # What student entries have above the teacher's is what they lack below it.
    return (q - p).clamp_min(0).sum(-1), torch.einsum("...ij,...j->...i", jacobian, by_q) / tau


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 7, dtype=F64) * 2, torch.randn(5, 7, dtype=F64) * 2


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_the_closed_form(
    name: str, tau: float, logits: tuple[Tensor, Tensor]
) -> None:
    value, slope = closed(name, *logits, tau)
    share = WEIGHTS / WEIGHTS.sum()
    got = loss_of(name, *logits, tau, WEIGHTS)
    torch.testing.assert_close(got, (share * value).sum(), **CLOSE)
    got = gradient(name, *logits, tau, WEIGHTS)
    torch.testing.assert_close(got, share[:, None] * slope, **CLOSE)
    torch.testing.assert_close(loss_of(name, *logits, torch.tensor(tau)), value.mean(), **CLOSE)


@pytest.mark.parametrize("tau", [1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_of_both_sides(name: str, tau: float, logits: tuple[Tensor, Tensor]) -> None:
    s, t = (x.view(1, 5, 7).requires_grad_() for x in logits)
    w = WEIGHTS[None]
    assert torch.autograd.gradcheck(lambda x, y: loss_of(name, x, y, tau, w), (s, t))


def test_values_by_hand() -> None:
    s, t = torch.tensor([[0.0, math.log(3.0)]], dtype=F64), torch.zeros(1, 2, dtype=F64)
    assert float(loss_of("total_variation", s, t)) == pytest.approx(0.25)  # 1/4, 3/4 and halves
    assert float(loss_of("mse_logits", s, t)) == pytest.approx(math.log(3) ** 2 / 2)
    # σ(log 3) is 3/4: half of ½ log ½/¾ + ½ log ½/¼, and nothing for the equal class.
    wanted = (0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 2
    assert float(loss_of("sigmoid_kl", s, t)) == pytest.approx(wanted)


def test_total_variation_lies_between_nothing_and_one(logits: tuple[Tensor, Tensor]) -> None:
    s, t = logits
    far = torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([[-1e4, 0.0, 1e4]])
    assert loss_of("total_variation", *far) == 1
    for tau in (0.3, 1.0, 10.0):
        assert 0 < loss_of("total_variation", s, t, tau) < 1
    assert loss_of("total_variation", s, t, 1e6) < 1e-5  # no τ²: uniform against uniform
    shifted = loss_of("total_variation", s + 30, t - 20, 2.0)
    torch.testing.assert_close(shifted, loss_of("total_variation", s, t, 2.0), **CLOSE)


def test_total_variation_bounds_the_divergence(logits: tuple[Tensor, Tensor]) -> None:
    """Pinsker: TV² ≤ KL / 2, for each token."""
    for s, t in zip(*logits, strict=True):
        kl = losses.forward_kl(s[None], t[None])
        assert loss_of("total_variation", s[None], t[None]) ** 2 <= kl / 2


def test_mse_of_logits_knows_the_shift_and_no_temperature(logits: tuple[Tensor, Tensor]) -> None:
    s, t = logits
    plain = loss_of("mse_logits", s, t)
    assert loss_of("mse_logits", s, t, 4.0) == plain
    wanted = plain + 9 + 6 * (s - t).mean()
    torch.testing.assert_close(loss_of("mse_logits", s + 3, t), wanted, **CLOSE)


def test_sigmoid_kl_is_binary_cross_entropy_minus_the_entropy(
    logits: tuple[Tensor, Tensor],
) -> None:
    s, t = logits
    p = (t / 2).sigmoid()
    entropy = F.binary_cross_entropy(p, p)
    wanted = 4 * (F.binary_cross_entropy_with_logits(s / 2, p) - entropy)
    torch.testing.assert_close(loss_of("sigmoid_kl", s, t, 2.0), wanted, rtol=1e-8, atol=1e-10)
    # At a high temperature it is an eighth of the mean square of logits.
    limit = (s - t).square().mean() / 8
    torch.testing.assert_close(loss_of("sigmoid_kl", s, t, 1e4), limit, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_equal_logits_lose_nothing(name: str) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(3, 5, 333) * 3, torch.rand(3, 5)
    for tau in (1.0, 0.7):
        assert loss_of(name, x, x.clone(), tau, w) == 0
        limit = 1e-8 if name == "sigmoid_kl" else 0.0
        assert gradient(name, x, x, tau, w).abs().max() <= limit


@pytest.mark.parametrize("name", NAMES)
def test_columns_that_both_rule_out_add_nothing(name: str, logits: tuple[Tensor, Tensor]) -> None:
    s, t = (x.float() for x in logits)
    for hidden in (-1e9, -math.inf):
        columns = torch.full((5, 3), hidden)
        wide = torch.cat([s, columns], -1), torch.cat([t, columns], -1)
        share = 1.0 if name == "total_variation" else 7 / 10  # a mean counts them
        torch.testing.assert_close(loss_of(name, *wide), share * loss_of(name, s, t))
        got = gradient(name, *wide)
        torch.testing.assert_close(got[:, :7], share * gradient(name, s, t))
        assert not got[:, 7:].any()


def extremes() -> tuple[Tensor, Tensor]:
    """Every pair of extreme logits of an entry, beside an ordinary one."""
    values = (1e4, 30.0, 0.0, -30.0, -1e4, -math.inf)
    pairs = torch.tensor(list(itertools.product(values, repeat=2)))
    s, t = (torch.stack([x, torch.full_like(x, 0.5)], -1) for x in pairs.T)
    return s, t


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_have_values_and_gradients(name: str) -> None:
    s, t = extremes()
    ruled_out = (s == -math.inf).any(-1) & (t > -1e4).all(-1)  # and the teacher does not
    for a, b, infinite in zip(s, t, ruled_out, strict=True):
        value = loss_of(name, a[None], b[None])
        assert value >= 0
        assert value.isfinite() or (name == "sigmoid_kl" and infinite)
        assert gradient(name, a[None], b[None]).isfinite().all()
        leaf = b[None].clone().requires_grad_()
        by_teacher = torch.autograd.grad(loss_of(name, a[None], leaf), leaf)[0]
        assert by_teacher.isfinite().all() or not value.isfinite()


def test_sigmoid_kl_is_exact_where_sigmoids_saturate() -> None:
    """In float32, where σ(30) and σ(31) round to 1."""
    s, t = torch.tensor([[31.0, -31.0, 1e4, -1e4]]), torch.tensor([[30.0, -30.0, -1e4, 1e4]])
    entries = [loss_of("sigmoid_kl", a[None], b[None]) for a, b in zip(s[0], t[0], strict=True)]
    small = torch.full((2,), math.exp(-31))  # (e^-31 - e^-30) + e^-30 · (31 - 30)
    torch.testing.assert_close(torch.stack(entries[:2]), small, rtol=1e-4, atol=0)
    assert [float(x) for x in entries[2:]] == [1e4, 1e4]


# ---- with the head, by its own function


def side(v: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(9, width, generator=g),
        torch.randn(v, width, generator=g) * 0.4,
        torch.randn(v, generator=g),
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_fused_head_survives_columns_that_are_ruled_out(name: str) -> None:
    """By biases of -inf, on both sides and on the teacher's alone, beside tokens of NaN."""
    (h, w, b), (t, t_w, t_b) = side(17, 6, 0), side(17, 8, 1)
    b[3] = t_b[3] = t_b[5] = -math.inf
    weights = torch.rand(9)
    weights[2] = 0
    leaves = [x.clone().requires_grad_() for x in (h, w, b)]
    s, theirs = F.linear(*leaves), F.linear(t, t_w, t_b)
    wanted = loss_of(name, s, theirs, 2.0, weights)
    gradients = torch.autograd.grad(wanted, leaves)
    h[2], t[2] = math.nan, math.inf
    ours = [x.clone().requires_grad_() for x in (h, w, b)]
    options = {"student_bias": ours[2], "teacher_bias": t_b, "weights": weights, "compile": False}
    found = vocab_loss(*ours[:2], t, t_w, divergence=name, temperature=2.0, **options)
    torch.testing.assert_close(found.loss, wanted)
    assert found.loss.isfinite()
    for got, want in zip(torch.autograd.grad(found.loss, ours), gradients, strict=True):
        torch.testing.assert_close(got, want)
        assert got.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_student_equal_to_its_teacher(name: str) -> None:
    h, w, _ = side(17, 6, 0)
    hidden = h.clone().requires_grad_()
    out = vocab_loss(hidden, w, h, w, divergence=name, compile=False)
    assert out.loss == 0
    assert not torch.autograd.grad(out.loss, hidden)[0].any()


def test_a_stored_teacher_has_no_logits_to_compare() -> None:
    h, w, _ = side(17, 6, 0)
    ids, logs = torch.arange(3).expand(9, 3), torch.full((9, 3), math.log(0.2))
    for name in ("mse_logits", "sigmoid_kl"):
        mix = {"forward_kl": 1.0, name: 0.5}
        with pytest.raises(errors.OptionError, match=f"{name} compares logits.*total_variation"):
            vocab_loss_topk(h, w, ids, logs, divergence=mix)


# ---- in wrap


def stepped(name: str, compile: Any, call: dict[str, Tensor]) -> tuple[Any, list[Tensor]]:
    student, teacher = Model(0), Model(1, width=24)
    distiller = fxdistill.wrap(
        student, teacher, task="causal_lm", logit_loss=name, temperature=2.0, compile=compile
    )
    out = distiller(batch()[0], **call)
    out.loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in student.parameters()]
    return out, gradients


AOT = {"backend": "aot_eager"}
REGIONAL = pytest.param("regional", marks=pytest.mark.slow)  # its terms go through Inductor


@pytest.mark.parametrize("compile", [AOT, {**AOT, "fuse_head": False}, REGIONAL], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_mode_has_the_numbers_of_the_eager_one(name: str, compile: Any) -> None:
    wanted, gradients = stepped(name, False, batch()[1])
    found, ours = stepped(name, compile, batch()[1])
    torch.testing.assert_close(found.losses["logits"], wanted.losses["logits"])
    for got, want in zip(ours, gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compile", [False, AOT], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_counts_gives_zero(name: str, compile: Any) -> None:
    ids = batch()[0]
    out, gradients = stepped(name, compile, {"loss_mask": torch.zeros_like(ids)})
    assert out.loss == 0
    assert not any(g.any() for g in gradients)
