"""Losses that compare values of different shapes: a callable says so, and gets them as they are."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxdistill
from fxdistill import Match, errors
from fxdistill.losses import mse

MODES = pytest.mark.parametrize("compile", [False, "regional", {"backend": "aot_eager"}])
X = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8)


def cnn(width):
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), *head)


def pair():
    torch.manual_seed(0)
    return cnn(4), cnn(16)


def attention_transfer(student, teacher, weights):
    """Zagoruyko & Komodakis, 2017: maps of 4 and of 16 channels."""
    s, t = (F.normalize(x.square().sum(1).flatten(1)) for x in (student, teacher))
    return (s - t).square().mean()


def scaled(student, teacher, weights, *, by):
    return by * attention_transfer(student, teacher, weights)


scaled.compares_shapes = "any"


def wanted(student, teacher):
    with torch.no_grad():
        t = teacher[:2](X)
    loss = attention_transfer(student[:2](X), t, None)
    return loss, torch.autograd.grad(loss, student[0].weight)[0]


@MODES
def test_a_match_says_that_shapes_differ(compile):
    student, teacher = pair()
    match = {"1": Match(teacher="1", loss=attention_transfer, shapes="any")}
    options = {"task": "classification", "logit_loss": None, "compile": compile}
    out = fxdistill.wrap(student, teacher, match, **options)(X)
    loss, slope = wanted(student, teacher)
    torch.testing.assert_close(out.loss, loss)
    out.loss.backward()
    torch.testing.assert_close(student[0].weight.grad, slope)


def test_a_loss_says_so_itself_inside_a_partial_too():
    student, teacher = pair()
    loss = functools.partial(scaled, by=3.0)
    distiller = fxdistill.wrap(
        student, teacher, {"1": Match(teacher="1", loss=loss)}, logit_loss=None, compile=False
    )
    torch.testing.assert_close(distiller(X).loss, 3 * wanted(student, teacher)[0])


def test_as_the_loss_of_all_matches():
    student, teacher = pair()
    options = {"feature_loss": functools.partial(scaled, by=1.0), "logit_loss": None}
    distiller = fxdistill.wrap(student, teacher, {"1": "1"}, compile=False, **options)
    torch.testing.assert_close(distiller(X).loss, wanted(student, teacher)[0])


def test_other_losses_still_need_equal_shapes():
    match = {"1": Match(teacher="1", loss=attention_transfer)}
    distiller = fxdistill.wrap(*pair(), match, task="classification", compile=False)
    with pytest.raises(errors.ShapeError, match="a loss needs equal shapes"):
        distiller(X, labels=Y)


@pytest.mark.parametrize("loss", ["mse", None, mse])
def test_a_named_loss_compares_no_other_shapes(loss):
    with pytest.raises(errors.OptionError, match="mse compares values of equal shapes"):
        fxdistill.wrap(*pair(), {"1": Match(teacher="1", loss=loss, shapes="any")})


def test_an_unknown_option_is_named():
    match = Match(teacher="1", loss=attention_transfer, shapes="some")
    with pytest.raises(errors.OptionError, match=r"shapes='some'.*'equal' or 'any'"):
        fxdistill.wrap(*pair(), {"1": match})


def test_a_value_that_has_another_number_of_axes_is_handed_over():
    def pooled(student, teacher, weights):
        return (student.mean((1, 2, 3)) - teacher.mean(1)).square().mean()

    student, teacher = pair()
    match = {"1": Match(teacher="3", loss=pooled, shapes="any")}
    out = fxdistill.wrap(student, teacher, match, logit_loss=None, compile=False)(X)
    with torch.no_grad():
        t = teacher[:4](X).mean(1)
    torch.testing.assert_close(out.loss, (student[:2](X).mean((1, 2, 3)) - t).square().mean())
