"""Values [B, C, L]: a loss compares the channels at each place, as of maps [B, C, H, W]."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxdistill
from fxdistill import Match, errors, losses

AOT = {"backend": "aot_eager"}
OPTIONS = {"logit_loss": None, "label_loss": None}


class Convolved(nn.Module):
    """A convolution, what is behind it without weights, and the same with its places first."""

    def __init__(self, width=5):
        super().__init__()
        self.conv, self.act, self.norm = nn.Conv1d(3, width, 1), nn.ReLU(), nn.BatchNorm1d(width)
        self.tokens, self.head = nn.Identity(), nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.tokens(self.act(self.norm(self.conv(x))).mT).mean(1))


def pair(*widths):
    torch.manual_seed(0)
    return [Convolved(width).eval() for width in widths]


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "graph"])
def test_losses_see_the_channels_of_each_place(compile):
    """Each loss has the value that it has of tokens [B, L, C], whatever the layout of the other."""
    student, teacher = pair(5, 5)
    names = ["cosine", "fitnet", "l2", "mse", "attention_transfer", "gram"]
    ends = [("conv", "conv"), ("norm", "act"), ("conv", "tokens"), ("tokens", "conv")]
    if compile:  # to compile them all takes long
        names, ends = ["l2", "gram"], ends[1:3]
    mapping = [Match(s, t, loss=name) for s, t in ends for name in names]
    distiller = fxdistill.wrap(student, teacher, mapping, **OPTIONS, compile=compile)
    distiller.eval()
    x = torch.randn(3, 3, 7)
    found = list(distiller(x).losses.values())[-len(mapping) :]
    values = []
    for model in (student, teacher):
        conv = model.conv(x)
        norm = model.norm(conv)
        by_tap = {"conv": conv, "norm": norm, "act": norm.relu(), "tokens": norm.relu()}
        values.append({tap: value.mT.detach() for tap, value in by_tap.items()})
    for (s, t), got in zip(
        [pair for pair in ends for _ in names],
        zip(found, names * len(ends), strict=True),
        strict=True,
    ):
        value, name = got
        torch.testing.assert_close(value, getattr(losses, name)(values[0][s], values[1][t]))


def test_a_classifiers_samples_weigh_them_and_its_tokens_do_not():
    """With as many channels as tokens nothing of the text weighs a channel."""
    student, teacher = pair(5, 5)
    distiller = fxdistill.wrap(
        student,
        teacher,
        [Match("conv", "conv", loss="l2")],
        **OPTIONS,
        task="classification",
        compile=False,
    )
    x, keep = torch.randn(2, 3, 7), torch.tensor([1.0, 0.0])
    apart = (student.conv(x) - teacher.conv(x)).norm(dim=1)
    torch.testing.assert_close(distiller(x, loss_mask=keep).loss, apart[0].mean())


def test_a_loss_of_ones_own_a_layout_and_a_module_say_what_the_axes_are():
    student, teacher = pair(5, 5)
    x = torch.randn(3, 3, 7)
    s, t = student.conv(x), teacher.conv(x)

    def of_first(a, b, weights):
        return (a - b)[:, 0].square().mean()

    linear = nn.Linear(7, 7)
    mapping = [
        Match("conv", "conv", loss=of_first),
        Match("conv", "conv", loss="l2", rearrange="b c l -> b c l"),
        Match("conv", "conv", loss="l2", rearrange=("b c l -> b l c", None)),
        Match("conv", "conv", loss="l2", project=nn.Sequential(linear), rearrange="b c l -> b c l"),
    ]
    out = fxdistill.wrap(student, teacher, mapping, **OPTIONS, compile=False)(x)
    wanted = (
        (s - t)[:, 0].square().mean(),
        (s - t).norm(dim=2).mean(),
        (s - t).norm(dim=1).mean(),
        (linear(s) - t).norm(dim=2).mean(),
    )
    torch.testing.assert_close(list(out.losses.values())[-4:], list(wanted))


@pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "graph"])
def test_axes_that_may_be_either_ask_for_a_layout(compile):
    student, teacher = pair(5, 5)
    x = torch.randn(3, 3, 5)
    distiller = fxdistill.wrap(
        student, teacher, [Match("conv", "act", loss="l2")], **OPTIONS, compile=compile
    )
    asked = r"nothing tells which axis of the teacher's \[3, 5, 5\] is L: .*b c l -> b l c"
    with pytest.raises(errors.LayoutError, match=asked):
        distiller(x)


def test_other_channels_and_a_norm_that_was_taken_for_samples_get_advice():
    x = torch.randn(3, 3, 7)
    distiller = fxdistill.wrap(*pair(5, 6), {"conv": "conv"}, **OPTIONS, compile=False)
    with pytest.raises(errors.ShapeError, match=r"project='auto' or nn.Conv1d\(5, 6, 1\)"):
        distiller(x)
    wrap = functools.partial(fxdistill.wrap, **OPTIONS, compile=False)
    match = [Match("norm", "norm", loss="mse", project="auto")]
    with pytest.raises(errors.ProjectionError, match=r"project=nn.Conv1d\(5, 6, 1\)"):
        wrap(*pair(5, 6), match)(x)
    student, teacher = pair(5, 6)
    distiller = wrap(student, teacher, match, example_inputs=(x,))
    distiller.eval()
    (made,) = distiller.projections
    wanted = F.mse_loss(made(student.norm(student.conv(x))), teacher.norm(teacher.conv(x)))
    torch.testing.assert_close(distiller(x).loss, wanted)


def test_crd_makes_its_layers_for_the_channels():
    match = [Match("conv", "conv", loss=losses.CRD(width=4, size=8))]
    x = torch.randn(3, 3, 7)
    for examples in (None, (x,)):
        distiller = fxdistill.wrap(
            *pair(5, 6), match, **OPTIONS, compile=False, example_inputs=examples
        )
        assert distiller(x).loss.isfinite()
        match = [Match("conv", "conv", loss=losses.CRD(width=4, size=8))]
