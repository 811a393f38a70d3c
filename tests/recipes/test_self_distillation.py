"""Features of ``be_your_own_teacher``: means over the places of whatever blocks return."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxdistill
from fxdistill import errors, presets
from toys import assert_same_gradients, gradients

SIZE = 6  # of all axes, so that only the student can tell which is which


class Mix(nn.Module):
    """A block on ``[B, *places, C]``, with a convolution inside where places have two axes."""

    def __init__(self, dims):
        super().__init__()
        self.mix = nn.Conv2d(SIZE, SIZE, 3, padding=1) if dims == 2 else None
        self.norm, self.layer = nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x):
        if self.mix is not None:
            x = self.mix(x.movedim(-1, 1)).movedim(1, -1)
        return x + self.layer(self.norm(x)).relu()


class Net(nn.Module):
    """Blocks with the channels last, or convolutions of signals, which have them on axis 1."""

    def __init__(self, dims, *, last):
        super().__init__()
        made = [Mix(dims) if last else nn.Conv1d(SIZE, SIZE, 3, padding=1) for _ in range(3)]
        self.blocks, self.fc = nn.ModuleList(made), nn.Linear(SIZE, 4)
        self.places = tuple(range(1, 1 + dims)) if last else (2,)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean(self.places))


BLOCKS = [f"blocks.{i}" for i in range(3)]


@pytest.mark.parametrize(("dims", "last"), [(2, True), (1, True), (1, False)])
def test_places_are_pooled(dims, last):
    torch.manual_seed(0)
    student, y = Net(dims, last=last), torch.tensor([0, 1, 2, 0])
    x = torch.randn(4, *(SIZE,) * dims, SIZE)
    shown = {"example_inputs": (x,)}
    preset = presets.be_your_own_teacher(student, BLOCKS, feature=0.5, **shown)
    options = {"task": "classification", "compile": False, **shown}
    distiller = fxdistill.wrap(student, None, **preset, **options)
    plain, layers = copy.deepcopy(student), copy.deepcopy(distiller.heads)
    out = distiller(x, labels=y)
    out.loss.backward()

    values, h = [], x
    for block in plain.blocks:
        h = block(h)
        values.append(h.mean(plain.places))
    own = plain.fc(values[-1])
    total = F.cross_entropy(own, y)
    for i, value in enumerate(values[:2]):
        made = layers[f"exit{i}"].linear(value)
        soft, target = (made / 3).log_softmax(-1), (own.detach() / 3).softmax(-1)
        total = total + 0.7 * F.cross_entropy(made, y)
        total = total + 0.3 * 9 * F.kl_div(soft, target, reduction="batchmean")
        total = total + 0.5 * (value - values[-1].detach()).square().sum(1).mean()
    total.backward()
    torch.testing.assert_close(out.loss, total)
    assert_same_gradients(gradients(student), gradients(plain))
    assert_same_gradients(gradients(distiller.heads), gradients(layers))


def test_places_that_cannot_be_told_are_said():
    student = Net(2, last=True)
    with pytest.raises(errors.OptionError, match=r"'blocks\.0'.*example_inputs=.*reduce="):
        presets.be_your_own_teacher(student, BLOCKS)
    said = ("b h w c -> b c", "mean")
    assert presets.be_your_own_teacher(student, BLOCKS, reduce=said)["mapping"]
    assert "mapping" not in presets.be_your_own_teacher(student, BLOCKS, feature=0)
