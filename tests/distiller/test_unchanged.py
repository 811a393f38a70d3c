"""What looks at a model, or compiles it, leaves it as it was, whatever a forward writes."""

import copy

import pytest
import torch
from torch import nn

import fxdistill
from fxdistill import errors
from toys import AOT, tokens


class Writer(nn.Module):
    """Writes in the ways that code of today has, none of which moves a version counter."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)
        self.norm = nn.BatchNorm1d(8)  # torch's own running statistics
        self.register_buffer("codes", torch.zeros(8))
        self.register_buffer("shift", torch.zeros(8))
        self.started, self.last, self.stage = False, None, "new"
        self.losses, self.seen, self.draws = [], {"calls": 0}, torch.Generator().manual_seed(3)

    def forward(self, ids):
        x = self.embed(ids)
        x = self.norm(x.flatten(0, 1)).view_as(x)
        if not self.started:
            with torch.no_grad():
                self.shift.copy_(x.mean((0, 1)))
            self.started, self.stage = True, "started"
        self.codes.data.mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))
        self.last = x.detach()
        if not torch.compiler.is_compiling():  # what dynamo cannot trace
            self.losses.append(x.detach().mean())
            self.seen["calls"] += 1
            torch.rand(1, generator=self.draws)
        return {"logits": self.head(x + self.shift - self.codes)}


CALLS = {
    "warmup": lambda distiller, batch: distiller.warmup(**batch),
    "explain": lambda distiller, batch: distiller.explain(batch),
    "gradient_norms": fxdistill.gradient_norms,
}


def state(model):
    own = (model.started, model.last, model.stage, list(model.losses), dict(model.seen))
    return copy.deepcopy(model.state_dict()), own, model.draws.get_state()


@pytest.mark.parametrize(
    ("call", "compile"),
    [("warmup", AOT), ("warmup", "regional"), ("explain", False), ("gradient_norms", False)],
    ids=str,
)
def test_the_model_is_as_it_was(call, compile):
    student = Writer()
    distiller = fxdistill.wrap(student, Writer(), task="causal_lm", compile=compile)
    ids = tokens()
    values, own, numbers = state(student)
    CALLS[call](distiller, {"ids": ids, "labels": ids})
    now, own_now, numbers_now = state(student)
    assert all(torch.equal(now[name], value) for name, value in values.items())
    assert own_now == own
    assert torch.equal(numbers_now, numbers)
    distiller(ids, labels=ids)
    assert student.shift.any()  # so the flag and what it guards went back together


class Shifted(nn.Module):
    """Data-dependent initialization of a parameter, through ``.data``."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)
        self.shift = nn.Parameter(torch.zeros(8))

    def forward(self, ids):
        x = self.embed(ids)
        self.shift.data.copy_(x.detach().mean((0, 1)))
        return {"logits": self.head(x + self.shift)}


@pytest.mark.parametrize("call", ["explain", "gradient_norms"])
def test_a_parameter_written_behind_its_version_is_named(call):
    ids = tokens()
    distiller = fxdistill.wrap(Shifted(), Shifted(), task="causal_lm", compile=False)
    with pytest.raises(errors.StepError, match=r"Shifted\.shift"):
        CALLS[call](distiller, {"ids": ids, "labels": ids})


@pytest.mark.parametrize("call", ["explain", "gradient_norms"])
def test_gradients_cannot_be_read_in_inference_mode(call):
    ids = tokens()
    distiller = fxdistill.wrap(Shifted(), Shifted(), task="causal_lm", compile=False)
    with torch.inference_mode(), pytest.raises(errors.StepError, match=f"{call} reads gradients"):
        CALLS[call](distiller, {"ids": ids, "labels": ids})


@pytest.mark.parametrize("call", CALLS)
def test_lazy_layers_are_built_and_stay(call):
    student, teacher = (
        nn.Sequential(nn.Embedding(50, 8), nn.LazyLinear(8), nn.Linear(8, 50)) for _ in range(2)
    )
    teacher(tokens())
    distiller = fxdistill.wrap(student, teacher, task="causal_lm", compile=False)
    ids = tokens()
    if call == "warmup":
        distiller = fxdistill.wrap(student, teacher, task="causal_lm", compile=AOT)
    CALLS[call](distiller, {"input": ids, "labels": ids})
    if call != "warmup":
        assert student[1].in_features == 8
    distiller(ids, labels=ids).loss.backward()


class Hooked(nn.Module):
    """Puts a hook into a part of itself in its first run, and remembers that it did."""

    def __init__(self):
        super().__init__()
        self.embed, self.head, self.hooked = nn.Embedding(50, 8), nn.Linear(8, 50), False

    def forward(self, ids):
        if not self.hooked:
            self.head.register_forward_hook(lambda module, args, output: 2 * output)
            self.hooked = True
        return {"logits": self.head(self.embed(ids))}


def test_a_model_that_puts_hooks_into_itself_does_it_once():
    student, ids = Hooked(), tokens()
    fxdistill.wrap(student, Hooked(), compile=False).explain({"ids": ids})
    student(ids)
    assert len(student.head._forward_hooks) == 1
