"""``warmup`` compiles ahead: the model is as it was, and the first step compiles nothing."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import fxdistill
from fxdistill import errors
from fxdistill.losses import CRD
from toys import MAPPING, gradients, tokens, toy_pair

AOT = {"backend": "aot_eager"}


class Counting(nn.Module):
    """Counts its calls in every way a module can, and draws a number in each."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(8))
        self.steps, self.kept = 0, torch.zeros(8)

    def forward(self, x):
        self.seen += 1
        self.steps += 1
        self.last = x.detach().mean((0, 1))
        self.kept = x.detach().mean((0, 1))
        return nn.functional.dropout(self.linear(x), 0.5, self.training)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.part, self.head = nn.Embedding(50, 8), Counting(), nn.Linear(8, 50)

    def forward(self, ids):
        return {"logits": self.head(self.part(self.embed(ids)))}


def states(distiller):
    models = (distiller, *distiller.models.values())
    modules = [m for model in models for m in model.modules()]
    tensors = [t for m in models for t in (*m.parameters(), *m.buffers())]
    counts = [(m.training, vars(m).get("steps")) for m in modules]
    kept = [m.kept for m in modules if isinstance(m, Counting)]
    return copy.deepcopy((tensors, kept, counts)), [id(t) for t in (*tensors, *kept)]


def assert_unchanged(before, distiller):
    (tensors, kept, counts), same = states(distiller)
    (old_tensors, old_kept, old_counts), old_same = before
    assert all(map(torch.equal, (*tensors, *kept), (*old_tensors, *old_kept)))
    assert counts == old_counts
    assert same == old_same


@pytest.mark.parametrize(
    "compile",
    [AOT, pytest.param("regional", marks=pytest.mark.slow)],  # which compiles with Inductor
    ids=["one graph", "regional"],
)
def test_warmup_leaves_no_trace_and_the_first_step_compiles_nothing(compile):
    student, teacher = Model(), Model()
    loss = CRD(width=4, size=16)
    loss.embedding.build(8, 8, torch.device("cpu"))
    match = fxdistill.Match("part", "part", loss=loss)
    distiller = fxdistill.wrap(student, teacher, [match], task="causal_lm", compile=compile)
    reference = copy.deepcopy(distiller)
    ids = tokens()
    parameter = student.head.weight
    parameter.grad = torch.ones_like(parameter)
    before, gradient = states(distiller), parameter.grad
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    distiller.warmup(ids, labels=ids)
    assert_unchanged(before, distiller)
    assert parameter.grad is gradient
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert all(p.grad is None for p in distiller.parameters() if p is not parameter)
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert random.getstate() == numbers[1]
    assert np.random.get_state()[1].tolist() == numbers[2]

    parameter.grad = None
    counters.clear()
    out = distiller(ids, labels=ids)
    out.loss.backward()
    assert not counters["stats"]
    assert not counters["frames"]
    assert not counters["inductor"]
    assert [event for event, _ in distiller.journal.events] == ["capture"]

    torch.set_rng_state(numbers[0])
    expected = reference(ids, labels=ids)
    expected.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    theirs = gradients(reference)
    for name, gradient in gradients(distiller).items():
        torch.testing.assert_close(gradient, theirs[name])


def test_an_error_in_warmup_leaves_no_trace_either():
    distiller = fxdistill.wrap(Model(), Model(), task="causal_lm", compile=AOT)
    before = states(distiller)
    with pytest.raises(errors.FxDistillError):
        distiller.warmup(tokens(), labels=tokens()[:, :3])
    assert_unchanged(before, distiller)


class WritesParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)
        self.average = nn.Parameter(torch.zeros(8), requires_grad=False)

    def forward(self, ids):
        x = self.embed(ids)
        with torch.no_grad():
            self.average.copy_(x.mean((0, 1)))
        return {"logits": self.head(x)}


def test_a_parameter_that_the_forward_writes_is_named():
    distiller = fxdistill.wrap(WritesParameter(), Model(), compile=AOT)
    with pytest.raises(errors.StepError, match=r"WritesParameter\.average"):
        distiller.warmup(tokens())


def test_without_gradients_only_the_forward_is_compiled():
    distiller = fxdistill.wrap(*toy_pair("batchnorm"), MAPPING, compile=AOT).eval()
    with torch.no_grad():
        distiller.warmup(tokens())
        counters.clear()
        distiller(tokens())
    assert not counters["stats"]


def test_there_is_nothing_to_compile_eagerly(monkeypatch):
    distiller = fxdistill.wrap(*toy_pair(), MAPPING, compile=False)
    monkeypatch.setattr(type(distiller), "_run", lambda *_: pytest.fail("a step has run"))
    distiller.warmup(tokens())
