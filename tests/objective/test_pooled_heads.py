"""What ``Head(module="auto")`` pools: the places of a value, and never its channels.

All sizes are equal, so that only the models can tell which axis is which.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxdistill
from fxdistill import Head, errors
from toys import AOT, assert_same_gradients, gradients

SIZE = 6


class Last(nn.Module):
    """A block on maps ``[B, H, W, C]``; with ``mixes``, convolutions inside tell a wrong tale."""

    def __init__(self, *, mixes):
        super().__init__()
        self.mix = nn.Conv2d(SIZE, SIZE, 3, padding=1, groups=SIZE) if mixes else None
        self.norm = nn.LayerNorm(SIZE)
        self.layer = nn.Linear(SIZE, SIZE)

    def forward(self, x):
        if self.mix is not None:
            x = self.mix(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.layer(self.norm(x)).relu()


class Net(nn.Module):
    """A stem, blocks, and a classifier of the mean over places."""

    def __init__(self, stem, blocks, *, last, flat=False):
        super().__init__()
        self.stem, self.blocks = stem, nn.ModuleList(blocks)
        self.fc = nn.Linear(SIZE**2 * SIZE if flat else SIZE, 3)
        self.last, self.flat = last, flat

    def forward(self, x):
        x = self.stem(x)
        x = x.movedim(1, -1) if self.last and not isinstance(self.stem, nn.Linear) else x
        for block in self.blocks:
            x = block(x)
        if self.flat:
            return self.fc(x.flatten(1))
        return self.fc(x.flatten(1, -2).mean(1) if self.last else x.flatten(2).mean(2))


def swin(*, mixes):
    return Net(nn.Conv2d(1, SIZE, 1), [Last(mixes=mixes) for _ in range(2)], last=True)


def convolved(dims, **options):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    block = nn.Sequential(kind(SIZE, SIZE, 3, padding=1), nn.Tanh())
    return Net(kind(1, SIZE, 1), [block], last=False, **options)


def mixer():
    return Net(nn.Linear(SIZE, SIZE), [Last(mixes=False)], last=True)


IMAGE, SIGNAL = (4, 1, SIZE, SIZE), (4, 1, SIZE)


@pytest.mark.parametrize(
    ("model", "shape", "path", "places", "examples", "compile"),
    [
        # Without examples, structure tells the width, and the student the axis at the first step.
        (lambda: swin(mixes=True), IMAGE, "blocks.0", (1, 2), False, AOT),
        (lambda: swin(mixes=True), IMAGE, "blocks.0", (1, 2), True, False),
        (lambda: swin(mixes=False), IMAGE, "blocks.0", (1, 2), True, False),
        (lambda: swin(mixes=False), IMAGE, "blocks.0.norm", (1, 2), False, False),
        (lambda: convolved(1), SIGNAL, "stem", (2,), False, False),
        (lambda: convolved(1), SIGNAL, "blocks.0", (2,), True, False),
        (lambda: convolved(2, flat=True), IMAGE, "blocks.0", (2, 3), True, False),  # of one size
        (lambda: convolved(3), (*IMAGE, SIZE), "blocks.0", (2, 3, 4), True, False),
        (mixer, (4, SIZE, SIZE), "blocks.0", (1,), True, False),
    ],
)
def test_places_are_pooled(model, shape, path, places, examples, compile):
    torch.manual_seed(0)
    student, x, y = model(), torch.randn(shape), torch.tensor([0, 1, 2, 0])
    plain = copy.deepcopy(student)
    options = {"example_inputs": (x,)} if examples else {}
    heads = {"exit": Head(path, module="auto")}
    distiller = fxdistill.wrap(
        student, None, heads=heads, task="classification", compile=compile, **options
    )
    layer = copy.deepcopy(distiller.heads["exit"].linear)
    out = distiller(x, labels=y)
    out.loss.backward()

    seen = []
    plain.get_submodule(path).register_forward_hook(lambda module, args, value: seen.append(value))
    own = F.cross_entropy(plain(x), y)
    early = F.cross_entropy(layer(seen[0].mean(places)), y)
    (own + early).backward()
    torch.testing.assert_close(out.losses["exit:labels"], early.detach())
    torch.testing.assert_close(out.loss, own + early)
    assert_same_gradients(gradients(student), gradients(plain))
    assert_same_gradients(gradients(distiller.heads["exit"].linear), gradients(layer))
    alone = distiller.heads["exit"](seen[0])  # as it is used without the distiller
    torch.testing.assert_close(alone, layer(seen[0].mean(places)))


class Unwilling(nn.Module):
    """A model that looks at its input, and so runs on none that is fake."""

    def __init__(self):
        super().__init__()
        self.inner = swin(mixes=True)

    def forward(self, x):
        return self.inner(x + x.sum().item() * 0)


def test_what_cannot_be_told_is_said():
    student = Unwilling()
    heads = {"exit": Head("inner.blocks.0", module="auto")}
    distiller = fxdistill.wrap(student, None, heads=heads, task="classification", compile=False)
    with pytest.raises(errors.ShapeError, match=r"'exit'.* \[4, 6, 6, 6\] .*module="):
        distiller(torch.randn(IMAGE), labels=torch.tensor([0, 1, 2, 0]))


def test_a_value_of_another_width_is_said():
    student, x = convolved(2), torch.randn(IMAGE)
    heads = {"exit": Head("stem", module="auto")}
    options = {"task": "classification", "compile": False}
    distiller = fxdistill.wrap(student, None, heads=heads, **options)
    student.stem = nn.Conv2d(1, 5, 1)
    student.blocks = nn.ModuleList([nn.Conv2d(5, SIZE, 1)])
    with pytest.raises(errors.ShapeError, match=r"width 6, and this one is \[4, 5, 6, 6\]"):
        distiller(x, labels=torch.tensor([0, 1, 2, 0]))


class Behind(nn.Module):
    """A model whose last layer by definition is no classifier."""

    def __init__(self):
        super().__init__()
        self.first, self.fc, self.other = nn.Linear(5, 5), nn.Linear(5, 3), nn.Linear(3, 7)

    def forward(self, features):
        return self.fc(self.first(features))


def test_classes_are_those_of_the_logits():
    """Without a run, the layer that is defined last is a guess, and the error says what to do."""
    x, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    options = {"heads": {"exit": Head("first", module="auto")}, "task": "classification"}
    distiller = fxdistill.wrap(Behind(), None, compile=False, **options)
    with pytest.raises(errors.ShapeError, match=r"'exit' gives \[4, 7\].*example_inputs="):
        distiller(x, labels=y)
    distiller = fxdistill.wrap(Behind(), None, compile=False, example_inputs=(x,), **options)
    assert "exit:labels" in distiller(x, labels=y).losses
