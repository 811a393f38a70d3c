"""Losses against closed forms, `torch.distributions`, limits and identities."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from fxdistill import losses
from fxdistill.losses.reduce import weighted_mean

F64 = torch.float64
FEATURES = ("mse", "l2", "smooth_l1", "l1", "cosine")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
LOGITS = (*DIVERGENCES, "soft_cross_entropy")
OTHERS = ("total_variation", "mse_logits", "sigmoid_kl")  # test_logits.py has more of these
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


def feature(name: str, student: Any, teacher: Any, weights: Any = None) -> Tensor:
    s, t = torch.as_tensor(student, dtype=F64), torch.as_tensor(teacher, dtype=F64)
    return getattr(losses, name)(
        s, t, None if weights is None else torch.as_tensor(weights, dtype=F64)
    )


def divergence(
    name: str, s: Tensor, t: Tensor, temperature: float = 1.0, weights: Tensor | None = None
) -> Tensor:
    loss: Callable[..., Tensor] = getattr(losses, name)
    return loss(s, t, temperature=temperature, weights=weights)


def gradient(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(fn(x), x)[0]


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 7, dtype=F64) * 2, torch.randn(5, 7, dtype=F64) * 2


# ---- features


@pytest.mark.parametrize(
    ("name", "student", "teacher", "value"),
    [
        ("mse", [[1.0, 2.0]], [[3.0, 2.0]], 2.0),
        ("l1", [[1.0, 2.0]], [[4.0, 3.0]], 2.0),
        ("l2", [[1.0, 2.0]], [[4.0, 6.0]], 5.0),
        ("smooth_l1", [[0.0, 0.0]], [[0.5, 2.0]], (0.125 + 1.5) / 2),
        ("smooth_l1", [[1.0]], [[0.0]], 0.5),  # the two branches meet at beta = 1
        ("cosine", [[2.0, 0.0]], [[0.0, 3.0]], 1.0),
        ("cosine", [[2.0, 2.0]], [[-1.0, -1.0]], 2.0),
        ("cosine", [[3.0, 4.0]], [[4.0, 3.0]], 1 - 24 / 25),
    ],
)
def test_feature_constants(name: str, student: Any, teacher: Any, value: float) -> None:
    torch.testing.assert_close(feature(name, student, teacher), torch.tensor(value, dtype=F64))


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
@pytest.mark.parametrize("name", FEATURES)
def test_feature_weights_average_tokens(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    s, t = torch.randn(2, *shape, 4, dtype=F64)
    w = torch.tensor([1.0, 0.0, 3.0, 0.5, 0.0, 2.0], dtype=F64)
    each = torch.stack(
        [feature(name, a[None], b[None]) for a, b in zip(s.view(6, 4), t.view(6, 4), strict=True)]
    )
    value = feature(name, s, t, w.view(shape))
    torch.testing.assert_close(value, (w * each).sum() / w.sum(), **CLOSE)
    torch.testing.assert_close(feature(name, s, t, 7 * w.view(shape)), value, **CLOSE)
    torch.testing.assert_close(feature(name, s, t), each.mean(), **CLOSE)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("mse", lambda d: 2 * d / d.shape[1]),
        ("l1", lambda d: d.sign() / d.shape[1]),
        ("l2", lambda d: d / (d**2).sum(1, keepdim=True).sqrt()),
        ("smooth_l1", lambda d: d.clamp(-1, 1) / d.shape[1]),
    ],
)
def test_feature_gradients(name: str, wanted: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    s, t = torch.randn(2, 5, 4, dtype=F64) * 2
    w = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5], dtype=F64)
    got = gradient(lambda x: feature(name, x, t, w), s)
    torch.testing.assert_close(got, wanted(s - t) * (w / w.sum())[:, None], **CLOSE)


def test_cosine_ignores_scale_and_its_gradient_is_tangent() -> None:
    torch.manual_seed(0)
    s, t = torch.randn(2, 5, 4, dtype=F64)
    torch.testing.assert_close(feature("cosine", 9 * s, 0.1 * t), feature("cosine", s, t), **CLOSE)
    got = gradient(lambda x: feature("cosine", x, t), s)
    torch.testing.assert_close((got * s).sum(1), torch.zeros(5, dtype=F64), **CLOSE)


@pytest.mark.parametrize("name", ["l2", "cosine"])
def test_features_have_finite_gradients_at_zero(name: str) -> None:
    zeros = torch.zeros(3, 4)
    for teacher in (zeros, torch.ones(3, 4)):
        got = gradient(lambda x, t=teacher: getattr(losses, name)(x, t, None), zeros)
        assert got.isfinite().all()


@pytest.mark.parametrize("name", FEATURES)
def test_feature_gradcheck(name: str) -> None:
    torch.manual_seed(0)
    s, t = torch.randn(2, 2, 3, 4, dtype=F64)
    w = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 1.0]], dtype=F64)
    assert torch.autograd.gradcheck(lambda x: feature(name, x, t, w), s.requires_grad_())


# ---- logits


def categorical(name: str, s: Tensor, t: Tensor, beta: float = 0.5) -> Tensor:
    p_s, p_t = Categorical(logits=s), Categorical(logits=t)
    if name == "forward_kl":
        return kl_divergence(p_t, p_s)
    if name == "reverse_kl":
        return kl_divergence(p_s, p_t)
    if name == "soft_cross_entropy":
        return kl_divergence(p_t, p_s) + p_t.entropy()
    mixed = Categorical(probs=beta * p_t.probs + (1 - beta) * p_s.probs)
    return beta * kl_divergence(p_t, mixed) + (1 - beta) * kl_divergence(p_s, mixed)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", LOGITS)
def test_divergences_equal_distributions(
    name: str, temperature: float, logits: tuple[Tensor, Tensor]
) -> None:
    s, t = logits
    w = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], dtype=F64)

    def wanted(x: Tensor) -> Tensor:
        each = categorical(name, x / temperature, t / temperature) * temperature**2
        return (w * each).sum() / w.sum()

    def got(x: Tensor) -> Tensor:
        return divergence(name, x, t, temperature, w)

    torch.testing.assert_close(got(s), wanted(s), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(gradient(got, s), gradient(wanted, s), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_beta(beta: float, logits: tuple[Tensor, Tensor]) -> None:
    s, t = logits
    got = losses.jsd(s, t, beta=beta, temperature=1.0, weights=None)
    torch.testing.assert_close(got, categorical("jsd", s, t, beta).mean(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("beta", "name"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_jsd_ends_are_the_two_kls(beta: float, name: str, logits: tuple[Tensor, Tensor]) -> None:
    s, t = logits
    end = functools.partial(losses.jsd, beta=beta, temperature=2.0, weights=None)
    kl = functools.partial(getattr(losses, name), temperature=2.0, weights=None)
    torch.testing.assert_close(end(s, t), kl(s, t), **CLOSE)
    torch.testing.assert_close(
        gradient(lambda x: end(x, t), s), gradient(lambda x: kl(x, t), s), **CLOSE
    )


def test_jsd_is_symmetric_bounded_and_tends_to_kl(logits: tuple[Tensor, Tensor]) -> None:
    s, t = logits
    torch.testing.assert_close(divergence("jsd", s, t), divergence("jsd", t, s), **CLOSE)
    assert divergence("jsd", 100 * s, -100 * s) <= math.log(2) + 1e-12
    small = losses.jsd(s, t, beta=1e-5, temperature=1.0, weights=None) / 1e-5
    torch.testing.assert_close(small, divergence("forward_kl", s, t), rtol=1e-2, atol=0)


def test_forward_kl_gradient_is_the_difference_of_probabilities(
    logits: tuple[Tensor, Tensor],
) -> None:
    s, t = logits
    wanted = (s.softmax(-1) - t.softmax(-1)) / len(s)
    for name in ("forward_kl", "soft_cross_entropy"):
        torch.testing.assert_close(
            gradient(lambda x, n=name: divergence(n, x, t), s), wanted, **CLOSE
        )


@pytest.mark.parametrize(
    ("name", "factor"), [("forward_kl", 1.0), ("reverse_kl", 1.0), ("jsd", 0.25)]
)
def test_high_temperature_is_half_the_variance_of_the_difference(
    name: str, factor: float, logits: tuple[Tensor, Tensor]
) -> None:
    s, t = logits
    difference = (s - t) - (s - t).mean(-1, keepdim=True)
    wanted = factor * (difference**2).mean(-1).mean() / 2
    torch.testing.assert_close(divergence(name, s, t, 1e4), wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", LOGITS)
def test_logit_losses_ignore_a_shift(name: str, logits: tuple[Tensor, Tensor]) -> None:
    s, t = logits
    shifted = divergence(name, s + 30, t - 20, 2.0)
    torch.testing.assert_close(shifted, divergence(name, s, t, 2.0), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("hidden", [-1e9, -math.inf])
@pytest.mark.parametrize("name", LOGITS)
def test_masked_columns_count_nothing(
    name: str, hidden: float, logits: tuple[Tensor, Tensor]
) -> None:
    s, t = (x.float() for x in logits)
    hidden = torch.full((5, 3), hidden)
    wide = (torch.cat([s, hidden], -1), torch.cat([t, hidden], -1))
    torch.testing.assert_close(divergence(name, *wide), divergence(name, s, t))
    got = gradient(lambda x: divergence(name, x, wide[1]), wide[0])
    torch.testing.assert_close(got[:, :7], gradient(lambda x: divergence(name, x, t), s))
    assert not got[:, 7:].any()


@pytest.mark.parametrize("name", LOGITS)
def test_logit_losses_survive_extreme_logits(name: str) -> None:
    s, t = torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([[-1e4, 0.0, 1e4]])
    assert divergence(name, s, t).isfinite()
    assert gradient(lambda x: divergence(name, x, t), s).isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", LOGITS)
def test_logit_gradcheck(name: str, temperature: float, logits: tuple[Tensor, Tensor]) -> None:
    s, t = (x.view(1, 5, 7) for x in logits)
    w = torch.tensor([[1.0, 0.0, 2.0, 0.5, 1.0]], dtype=F64)
    assert torch.autograd.gradcheck(
        lambda x: divergence(name, x, t, temperature, w), s.requires_grad_()
    )


@pytest.mark.parametrize("name", LOGITS)
def test_teacher_gradients_equal_distributions(name: str, logits: tuple[Tensor, Tensor]) -> None:
    """Mutual learning differentiates the second argument as well."""
    s, t = logits
    wanted = gradient(lambda x: categorical(name, s, x).mean(), t)
    got = gradient(lambda x: divergence(name, s, x), t)
    torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9)


# ---- labels


def test_cross_entropy_of_uniform_logits_is_log_of_the_vocabulary() -> None:
    value = losses.cross_entropy(
        torch.zeros(2, 3, 8), torch.ones(2, 3, dtype=torch.long), weights=None
    )
    torch.testing.assert_close(value, torch.tensor(math.log(8)))


def test_cross_entropy_is_minus_the_log_probability(logits: tuple[Tensor, Tensor]) -> None:
    s, w = logits[0], torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], dtype=F64)
    labels = torch.tensor([0, 6, 3, 3, 1])
    wanted = -(w * Categorical(logits=s).log_prob(labels)).sum() / w.sum()
    torch.testing.assert_close(losses.cross_entropy(s, labels, weights=w), wanted, **CLOSE)
    got = gradient(lambda x: losses.cross_entropy(x, labels, weights=w), s)
    onehot = torch.eye(7, dtype=F64)[labels]
    torch.testing.assert_close(got, (s.softmax(-1) - onehot) * (w / w.sum())[:, None], **CLOSE)


def test_cross_entropy_drops_ignored_labels(logits: tuple[Tensor, Tensor]) -> None:
    s, labels = logits[0], torch.tensor([0, -100, 3, -100, 1])
    kept = labels != -100
    for w in (None, torch.tensor([1.0, 3.0, 2.0, 0.5, 1.0], dtype=F64)):
        got = losses.cross_entropy(s, labels, weights=w)
        wanted = losses.cross_entropy(s[kept], labels[kept], weights=None if w is None else w[kept])
        torch.testing.assert_close(got, wanted, **CLOSE)
    nothing = losses.cross_entropy(s, torch.full((5,), -100), weights=None)
    assert nothing == 0


# ---- all


@pytest.mark.parametrize("name", [*FEATURES, *LOGITS, *OTHERS])
def test_no_weight_means_zero_and_zero_gradients(name: str) -> None:
    torch.manual_seed(0)
    s, t = torch.randn(2, 3, 4)
    w = torch.zeros(3)

    def loss(x: Tensor) -> Tensor:
        return (
            getattr(losses, name)(x, t, w) if name in FEATURES else divergence(name, x, t, 1.0, w)
        )

    assert loss(s) == 0
    assert not gradient(loss, s).any()


@pytest.mark.parametrize("name", ["mse", "l1", "l2", "smooth_l1"])
def test_equal_features_lose_exactly_nothing(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 16)
    w = torch.rand(3, 5)
    assert getattr(losses, name)(x, x.clone(), w) == 0
    assert not gradient(lambda s: getattr(losses, name)(s, x, w), x).any()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_equal_logits_diverge_exactly_by_nothing(name: str, temperature: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 333) * 3
    w = torch.rand(3, 5)
    assert divergence(name, x, x.clone(), temperature, w) == 0
    assert not gradient(lambda s: divergence(name, s, x, temperature, w), x).any()


@pytest.mark.parametrize("name", ["cosine", "jsd"])
def test_equal_inputs_lose_next_to_nothing(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 33)

    def loss(s: Tensor) -> Tensor:
        return losses.cosine(s, x, None) if name == "cosine" else divergence(name, s, x)

    assert abs(loss(x.clone())) < 1e-6
    assert gradient(loss, x).abs().max() < 1e-6


def test_soft_cross_entropy_of_equal_logits_is_the_entropy(logits: tuple[Tensor, Tensor]) -> None:
    s = logits[0]
    wanted = Categorical(logits=s).entropy().mean()
    torch.testing.assert_close(divergence("soft_cross_entropy", s, s), wanted, **CLOSE)


@pytest.mark.parametrize("name", [*FEATURES, *LOGITS, *OTHERS])
def test_double_precision_is_kept(name: str, logits: tuple[Tensor, Tensor]) -> None:
    s, t = logits
    value = feature(name, s, t) if name in FEATURES else divergence(name, s, t)
    assert value.dtype == F64
    assert value.dim() == 0


@pytest.mark.parametrize("name", [*LOGITS, *OTHERS])
def test_low_precision_logits_are_compared_in_single(
    name: str, logits: tuple[Tensor, Tensor]
) -> None:
    s, t = (x.bfloat16() for x in logits)
    got, wanted = divergence(name, s, t), divergence(name, s.float(), t.float())
    torch.testing.assert_close(got.float(), wanted, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", [*FEATURES, *LOGITS, *OTHERS, "cross_entropy"])
def test_what_does_not_count_may_be_anything(name: str, bad: float, side: str) -> None:
    torch.manual_seed(0)
    s, t = torch.randn(2, 3, 4)
    w = torch.tensor([1.0, 0.0, 2.0])
    spoilt = [x.clone() for x in (s, t)]
    spoilt[side == "teacher"][1] = bad

    def loss(x: Tensor, y: Tensor) -> Tensor:
        if name == "cross_entropy":
            return losses.cross_entropy(x, torch.tensor([0, 1, 2]), weights=w)
        return (
            getattr(losses, name)(x, y, w) if name in FEATURES else divergence(name, x, y, 1.0, w)
        )

    torch.testing.assert_close(loss(*spoilt), loss(s, t))
    got, want = gradient(lambda x: loss(x, spoilt[1]), spoilt[0]), gradient(lambda x: loss(x, t), s)
    torch.testing.assert_close(got, want)


def test_label_smoothing_and_z_loss_by_hand() -> None:
    """Two classes with logits 0 and log 3: probabilities 1/4 and 3/4, lse = log 4."""
    logits = torch.tensor([[0.0, math.log(3.0)]], dtype=F64)
    labels = torch.tensor([1])
    plain = -math.log(3 / 4)
    mean = -(math.log(1 / 4) + math.log(3 / 4)) / 2
    smooth = losses.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(float(smooth), 0.8 * plain + 0.2 * mean, **CLOSE)
    with_z = losses.cross_entropy(logits, labels, z_loss=0.5)
    torch.testing.assert_close(float(with_z), plain + 0.5 * math.log(4) ** 2, **CLOSE)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_mean_does_not_see_what_does_not_count(bad: float) -> None:
    values = torch.tensor([1.0, bad, 3.0], dtype=F64, requires_grad=True)
    mean = weighted_mean(values, torch.tensor([1.0, 0.0, 3.0]))
    assert float(mean.detach()) == 2.5
    (slope,) = torch.autograd.grad(mean, values)
    assert slope.tolist() == [0.25, 0.0, 0.75]
