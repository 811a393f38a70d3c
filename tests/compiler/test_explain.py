"""Errors of torch's own while a step is captured are ours, with the line; what runs, runs."""

import pytest
import torch
from torch import nn

import fxdistill
from fxdistill import errors

X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


class Picks(nn.Module):
    """As many numbers as there are positive ones."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def size(self, x):
        return len((x[:, 0] > 0).nonzero()[:, 0].tolist())

    def forward(self, x):
        return self.linear(x) * (1 + 0 * self.size(x))


class Masks(Picks):
    """A mask selects: its size depends on data, and a shape is made of it."""

    def size(self, x):
        return torch.zeros(x[x > 0].shape[0] + 1).reshape(-1, 1).expand(-1, 2).shape[0]


class Loops(Picks):
    def size(self, x):
        count = 0
        for _ in range(int((x[:, 0] > 0).sum())):
            count += 1
        return count


class Splits(Picks):
    """The forward can be captured; the backward puts parts of unknown sizes together."""

    def forward(self, x):
        sizes = (torch.stack([x[:, 0] > 0, x[:, 0] <= 0]).sum(1)).tolist()
        return torch.cat(torch.split(self.linear(x).tanh(), sizes), 0)


class Numpy(Picks):
    def size(self, x):
        return int(x.detach().numpy().size)


def distiller(kind, compile):
    torch.manual_seed(0)
    return fxdistill.wrap(kind(), kind(), label_loss=None, compile=compile)


KINDS = pytest.mark.parametrize("kind", [Picks, Masks, Loops, Splits, Numpy])
FALLBACK = {"backend": "aot_eager", "fallback": "regional"}


@KINDS
def test_every_error_while_capturing_is_ours(kind):
    made, failed = distiller(kind, {"backend": "aot_eager"}), None
    try:
        out = made(X)
    except errors.FxDistillError as error:
        failed = error
    if failed is None:  # dynamo makes a graph of it
        torch.testing.assert_close(out.loss, distiller(kind, False)(X).loss)
        return
    assert isinstance(failed, errors.CaptureError)
    if kind is not Splits:  # a backward has no lines
        assert "test_explain.py" in str(failed)
    if kind is not Numpy:
        assert "depends on the values of an input" in str(failed)
    with pytest.raises(errors.CaptureError):
        made.check(X)


@KINDS
@pytest.mark.filterwarnings("ignore:falling back:UserWarning")
@pytest.mark.filterwarnings("ignore:these inputs could not be checked:UserWarning")
@pytest.mark.parametrize("compile", [FALLBACK, False], ids=["fallback", "eager"])
def test_where_the_step_runs_nothing_fails(kind, compile):
    want = distiller(kind, False)(X).loss
    torch.testing.assert_close(distiller(kind, compile)(X).loss, want)
    report = distiller(kind, compile).report(X)
    assert report.stopped is None or "runs" in report.stopped or "CaptureError" in report.stopped
    distiller(kind, compile).check(X)
    fxdistill.wrap(kind(), kind(), label_loss=None, compile=compile, example_inputs=(X,))


def test_a_check_that_cannot_be_made_says_so():
    made = distiller(Picks, False)
    with pytest.warns(UserWarning, match="these inputs could not be checked"):
        assert made.check(X) is None


def test_errors_of_a_compiled_step_that_runs_are_not_explained_away():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise KeyError("in the backward")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return Fails.apply(self.linear(x))

    made = fxdistill.wrap(Model(), Model(), label_loss=None, compile=False)
    with pytest.raises(KeyError, match="in the backward"):
        made(X).loss.backward()
