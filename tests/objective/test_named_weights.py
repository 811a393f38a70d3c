"""Weights that a call brings by name: of samples, places, tokens."""

import functools
import itertools

import pytest
import torch
from torch import nn

import fxdistill
from fxdistill import Match, errors, losses
from image_nets import IMAGES, check, nets, values
from mesh_steps import AOT
from toys import tokens, toy_pair

WEIGHED = [
    *itertools.product(("mse", "l2", "attention_transfer", "fpn", "gram"), (False, AOT)),
    ("l2", "regional"),
]


@pytest.mark.parametrize("shape", [(5,), (5, 4, 4)], ids=str)
@pytest.mark.parametrize(("name", "compile"), WEIGHED)
def test_weights_by_name_weigh_samples_or_places(name, shape, compile):
    student, teacher = nets(teacher=4)
    match = Match("deep", "deep", loss=name, weights="foreground")
    distiller = fxdistill.wrap(student, teacher, [match], logit_loss=None, compile=compile)
    w = (torch.arange(torch.Size(shape).numel()) % 3).float().reshape(shape)
    out = distiller(IMAGES, weights={"foreground": w})
    with torch.no_grad():
        t = values(teacher, "deep", IMAGES)
    want = getattr(losses, name)(values(student, "deep", IMAGES), t, w)
    check(distiller, out.loss, want, student)


def test_weights_by_name_multiply_what_else_weighs_a_text():
    student, teacher = toy_pair()
    mapping = [Match("blocks.0.mlp", "blocks.0.mlp", weights="hard")]
    distiller = fxdistill.wrap(
        student, teacher, mapping, logit_loss=None, compile=False, task="causal_lm"
    )
    mask, hard = torch.ones(3, 7), torch.rand(3, 7)
    mask[0, 3:] = 0
    s, t = (values(model, "blocks.0.mlp", tokens()) for model in (student, teacher))
    for named in (hard, hard[:, 0]):
        out = distiller(tokens(), loss_mask=mask, weights={"hard": named})
        w = mask * (named if named.ndim == 2 else named[:, None])
        want = ((s - t).square().mean(-1) * w).sum() / w.sum()
        torch.testing.assert_close(out.loss, want)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "needs distiller.*'foreground'"),
        ({"weights": {"foregroud": torch.ones(5)}}, "needs distiller"),
        (
            {"weights": {"foreground": torch.ones(5), "back": torch.ones(5)}},
            "no match has that name",
        ),
        ({"weights": {"foreground": torch.ones(5, 3)}}, r"\[5, 3\], and weigh a value \[5, 4"),
        ({"weights": torch.ones(5)}, "a dict of tensors"),
    ],
)
def test_weights_that_do_not_fit_are_errors(given, says):
    student, teacher = nets(teacher=4)
    match = Match("deep", "deep", weights="foreground")
    for compile in (False, AOT):
        distiller = fxdistill.wrap(student, teacher, [match], logit_loss=None, compile=compile)
        with pytest.raises(errors.BatchError, match=says):
            distiller(IMAGES, **given)


@pytest.mark.parametrize("loss", ["attention_transfer", "gram"])
@pytest.mark.parametrize("compile", [False, AOT])
def test_weights_of_the_students_channels_do_not_fit_a_teacher_with_others(loss, compile):
    match = Match("deep", "deep", loss=loss, weights="foreground")
    distiller = fxdistill.wrap(*nets(teacher=6), [match], logit_loss=None, compile=compile)
    with pytest.raises(errors.BatchError, match=r"\[5, 4\], and weigh a value \[5, 6, 4, 4\]"):
        distiller(IMAGES, weights={"foreground": torch.ones(5, 4)})


def test_a_name_of_weights_is_text():
    with pytest.raises(errors.OptionError, match="a name, whose values a call brings"):
        fxdistill.wrap(*nets(teacher=4), [Match("deep", "deep", weights=torch.ones(5))])


def test_samples_weigh_flattened_tokens_by_name():
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 3)) for _ in range(2))
    mapping = [Match("1", "1", weights="hard")]
    distiller = fxdistill.wrap(student, teacher, mapping, logit_loss=None, compile=False)
    x, w = torch.randn(2, 5, 4), torch.tensor([1.0, 3.0])
    found = distiller(x, weights={"hard": w}).loss
    each = (student(x) - teacher(x)).square().mean(-1).reshape(2, 5).mean(1)
    torch.testing.assert_close(found, (each * w).sum() / w.sum())


def test_tokens_that_a_model_flattens_are_weighed_by_name():
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 3)) for _ in range(2))
    mapping = [Match("1", "1", weights="hard")]
    distiller = fxdistill.wrap(student, teacher, mapping, logit_loss=None, compile=False)
    x, w = torch.randn(2, 5, 4), torch.rand(2, 5)
    found = distiller(x, weights={"hard": w}).loss
    each = (student(x) - teacher(x)).square().mean(-1).reshape(2, 5)
    torch.testing.assert_close(found, (each * w).sum() / w.sum())
    with pytest.raises(errors.BatchError, match=r"the tokens \[B, L\] that are flattened"):
        distiller(x, weights={"hard": w[:, :4]})


def test_the_report_lists_loss_modules_and_what_weighs_a_match():
    student, teacher = nets()
    mapping = [
        Match("deep", "deep", loss=functools.partial(losses.CRD, width=3, size=12)),
        Match("stem", "stem", loss="gram", weights="foreground"),
    ]
    options = {"compile": AOT, "task": "classification"}
    distiller = fxdistill.wrap(student, teacher, mapping, **options)
    report = distiller.report(IMAGES, weights={"foreground": torch.ones(5)})
    found = {tower.name: tower for tower in report.towers}["loss_modules"]
    assert found.trainable == sum(p.numel() for p in distiller.loss_modules.parameters())
    assert found.bytes == 4 * (found.parameters + 12 * 3) + 2 * 8
    assert [pair.weighed_by for pair in report.pairs] == ["samples", "samples × 'foreground'"]
    # Layers [5, 4] -> 3 and [5, 6] -> 3, products with the queue and of gram: none are projections.
    assert report.flops.projections == 0
    assert report.flops.losses >= 2 * 5 * (4 + 6) * 3
