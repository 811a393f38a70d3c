"""Losses of maps, of detectors and of normalised features, against formulas place by place."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxdistill import errors, losses

F64 = torch.float64


def maps(channels: int = 3) -> tuple[Tensor, Tensor]:
    s = torch.randn(2, 3, 4, 5, dtype=F64, requires_grad=True)
    return s, torch.randn(2, channels, 4, 5, dtype=F64)


def close(found: Tensor, want: Tensor, s: Tensor) -> None:
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, s)[0] for x in (found, want)))


# Which of 2 samples, 4 x 5 places count, and how much.
INSIDE = (torch.arange(40).reshape(2, 4, 5) % 3).to(F64)
SAMPLES = torch.tensor([1.0, 3.0], dtype=F64)
WEIGHTS = {"none": None, "samples": SAMPLES, "places": INSIDE}


def by_place(weights: Tensor | None) -> Tensor:
    """The weight of each place ``[2, 4, 5]``."""
    if weights is None:
        return torch.ones(2, 4, 5, dtype=F64)
    return weights if weights.ndim == 3 else weights[:, None, None].expand(2, 4, 5)


@pytest.mark.parametrize("given", WEIGHTS)
def test_attention_transfer_compares_where_a_sample_is_active(given):
    s, t = maps(channels=6)
    w = by_place(WEIGHTS[given])
    gaps = []
    for b in range(2):
        at = w[b] != 0
        strength = [(x[b] ** 2).sum(0)[at] for x in (s, t)]
        one, other = (x / x.norm() for x in strength)
        gaps.append(((one - other) ** 2 * w[b][at]).sum())
    close(losses.attention_transfer(s, t, WEIGHTS[given]), sum(gaps) / w.sum(), s)


@pytest.mark.parametrize("given", WEIGHTS)
def test_fpn_weighs_by_the_teachers_strength_and_learns_nothing_from_it(given):
    s, t = maps()
    t.requires_grad_()
    w = by_place(WEIGHTS[given])
    values = torch.zeros(2, 4, 5, dtype=F64)
    total = s.sum() * 0
    for b in range(2):
        strength = t[b].detach().abs().mean(0)
        strength = strength / strength[w[b] != 0].max()
        values = ((strength * (s[b] - t[b])) ** 2).mean(0)
        total = total + (values * w[b]).sum()
    found = losses.fpn(s, t, WEIGHTS[given])
    by_s, by_t = torch.autograd.grad(found, (s, t), retain_graph=True)
    close(found, total / w.sum(), s)
    torch.testing.assert_close(by_t, -by_s)


@pytest.mark.parametrize("loss", [losses.attention_transfer, losses.fpn])
def test_tokens_are_places_too_and_padding_may_be_anything(loss):
    s, t = torch.randn(2, 6, 3, dtype=F64), torch.randn(2, 6, 3, dtype=F64)
    w = torch.tensor([[1.0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    as_maps = [x.transpose(1, 2).unsqueeze(-1) for x in (s, t)]
    torch.testing.assert_close(loss(s, t), loss(*as_maps))
    short, whole = ([x[:1, :4] for x in (s, t)], [x[1:] for x in (s, t)])
    want = (4 * loss(*short) + 6 * loss(*whole)) / 10
    s[0, 4:], t[0, 4:] = torch.nan, torch.inf
    s.requires_grad_()
    found = loss(s, t, w)
    torch.testing.assert_close(found, want)
    assert (torch.autograd.grad(found, s)[0][0, 4:] == 0).all()


@pytest.mark.parametrize("loss", [losses.attention_transfer, losses.fpn, losses.fitnet])
@pytest.mark.parametrize("given", WEIGHTS)
def test_gradients_of_maps_are_those_of_differences(loss, given):
    s, t = maps()
    assert torch.autograd.gradcheck(lambda s: loss(s, t, WEIGHTS[given]), (s,))


@pytest.mark.parametrize("loss", [losses.attention_transfer, losses.fpn, losses.fitnet])
def test_maps_of_zeros_and_maps_of_which_nothing_counts_have_finite_gradients(loss):
    for s, w in (
        (torch.zeros(2, 3, 4, 5), None),
        (torch.full((2, 3, 4, 5), torch.nan), torch.zeros(2, 4, 5)),
    ):
        s.requires_grad_()
        for t in (torch.randn(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)):
            found = loss(s, t, w)
            (gradient,) = torch.autograd.grad(found, s)
            assert found.isfinite()
            assert gradient.isfinite().all()


@pytest.mark.parametrize("given", WEIGHTS)
@pytest.mark.parametrize("name", ["l2", "cosine", "fitnet", "mse", "l1", "smooth_l1"])
def test_the_vector_of_a_map_is_its_channels_at_a_place(name, given):
    s, t = maps()
    w = by_place(WEIGHTS[given])
    each = {
        "l2": (s - t).norm(dim=1),
        "cosine": 1 - F.cosine_similarity(s, t, dim=1),
        "fitnet": (F.normalize(s, dim=1) - F.normalize(t, dim=1)).square().mean(1),
        "mse": (s - t).square().mean(1),
        "l1": (s - t).abs().mean(1),
        "smooth_l1": F.smooth_l1_loss(s, t, reduction="none").mean(1),
    }[name]
    close(getattr(losses, name)(s, t, WEIGHTS[given]), (each * w).sum() / w.sum(), s)


@pytest.mark.parametrize("scale", [1.0, 3.0, 1e4])
def test_fitnet_stays_exact_where_a_student_is_nearly_its_teacher(scale):
    t = torch.randn(4, 64)
    s = (t * scale * (1 + 1e-4 * torch.randn(4, 64))).requires_grad_()
    wide = s.detach().double().requires_grad_()
    unit = [F.normalize(x, dim=-1) for x in (wide, t.double())]
    want = (unit[0] - unit[1]).square().mean()
    found = losses.fitnet(s, t)
    assert float(found.detach()) == pytest.approx(float(want.detach()), rel=1e-3)
    by_s, by_wide = torch.autograd.grad(found, s)[0], torch.autograd.grad(want, wide)[0]
    assert (by_s - by_wide).norm() < 1e-3 * by_wide.norm()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda s: losses.attention_transfer(s, s[..., :3]), "reduce="),
        (lambda s: losses.attention_transfer(s[:, 0, 0], s[:, 0, 0]), "has no places"),
        (lambda s: losses.fpn(s, s[:, :2]), "project='auto'\\) maps the channels"),
        (lambda s: losses.detection_box(s, s), "boxes are"),
    ],
)
def test_maps_that_cannot_be_compared_are_errors(call, says):
    with pytest.raises(errors.ShapeError, match=says):
        call(torch.randn(2, 3, 4, 5))


# ---- detectors

FOREGROUND = torch.tensor([[1.0, 0, 1, 0, 0, 1], [0, 0, 0, 0, 1, 1]])


def detected(width: int) -> tuple[Tensor, Tensor]:
    s = torch.randn(2, 6, width, dtype=F64)
    s[0, 1] = torch.nan
    return s.requires_grad_(), torch.randn(2, 6, width, dtype=F64)


def test_classes_are_compared_by_binary_cross_entropy_at_a_temperature():
    s, t = detected(3)
    at = FOREGROUND != 0
    p, q = (torch.sigmoid(x[at] / 2) for x in (t, s))
    want = 4 * -(p * q.log() + (1 - p) * (1 - q).log()).mean()
    found = losses.detection_classification(s, t, FOREGROUND)
    torch.testing.assert_close(found, want)
    (gradient,) = torch.autograd.grad(found, s)
    torch.testing.assert_close(gradient[at], torch.autograd.grad(want, s)[0][at])
    assert (gradient[~at] == 0).all()


def test_classes_with_extreme_logits_have_finite_losses_and_gradients():
    s = torch.tensor([[[1e4, -1e4, 0.0, -torch.inf, -torch.inf]]], requires_grad=True)
    t = torch.tensor([[[-1e4, -1e4, 1e4, -torch.inf, 3.0]]])
    found = losses.detection_classification(s, t)
    assert found.isfinite()
    assert torch.autograd.grad(found, s)[0].isfinite().all()


def test_boxes_are_compared_by_smooth_l1_over_counted_anchors():
    s, t = detected(4)
    at = FOREGROUND != 0
    for beta in (1.0, 0.5):
        loss = functools.partial(losses.detection_box, beta=beta)
        want = F.smooth_l1_loss(s[at], t[at], beta=beta)
        found = loss(s, t, FOREGROUND)
        torch.testing.assert_close(found, want)
