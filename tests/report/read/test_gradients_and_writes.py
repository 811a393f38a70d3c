"""What a report names: inputs, parameters without a gradient, what is written, parts."""

import pytest
import torch
from torch import nn

import fxdistill
from toys import MAPPING, tokens, toy_pair

AOT = {"backend": "aot_eager"}


class Model(nn.Module):
    """May count its calls, write to its input, and hold what it never uses."""

    def __init__(self, *, counts=False, writes=False, unused=False):
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2) if unused else None
        self.register_buffer("calls", torch.zeros(()))
        self.counts, self.writes = counts, writes

    def forward(self, x, more=None):
        if self.counts:
            self.calls.add_(1)
        if self.writes:
            x.mul_(0.5)
        return self.head(self.body(x))


def report(student=None, teacher=None, **options):
    student, teacher = student or Model(), (teacher or Model()).eval()
    distiller = fxdistill.wrap(student, teacher, {"body": "body"}, compile=AOT, **options)
    found = distiller.report(torch.randn(5, 8), labels=torch.zeros(5, dtype=torch.long))
    assert found.stopped is None
    return found


def test_a_sound_pair_is_told_nothing():
    found = report()
    assert found.warnings == ()
    assert found.notes == ()


@pytest.mark.parametrize("meta", [False, True])
def test_parameters_without_a_gradient_are_named(meta):
    with torch.device("meta" if meta else "cpu"):
        student, teacher = Model(unused=True), Model()
    (warning,) = report(student, teacher).warnings
    assert warning == (
        "2 of 6 trainable parameters get no gradient in this step: student unused.weight, "
        "student unused.bias"
    )


def test_an_input_that_learns_is_no_parameter():
    student, teacher = Model(unused=True), Model().eval()
    distiller = fxdistill.wrap(student, teacher, {"body": "body"}, compile=AOT)
    prompt = torch.randn(5, 8, requires_grad=True)
    (warning,) = distiller.report(prompt).warnings
    assert warning.startswith("2 of 6 trainable parameters")


def test_a_frozen_teacher_that_writes_to_itself():
    (warning,) = report(teacher=Model(counts=True)).warnings
    assert "the teacher writes to its own calls" in warning
    learns = report(teacher=Model(counts=True), freeze_teacher=False)
    assert not [w for w in learns.warnings if "writes" in w]
    assert "each step in this mode writes to buffers: teacher calls" in learns.notes


def test_a_student_that_writes_to_itself_is_a_note():
    found = report(Model(counts=True))
    assert found.warnings == ()
    assert found.notes == ("each step in this mode writes to buffers: student calls",)


def test_batch_norm_writes_in_training_only():
    student, teacher = toy_pair("batchnorm")
    distiller = fxdistill.wrap(student, teacher, MAPPING, task="causal_lm", compile=AOT)
    ids = tokens()
    found = [distiller.train(mode).report(ids=ids, labels=ids) for mode in (True, False)]
    told = [any("blocks.0.norm.running_mean" in note for note in each.notes) for each in found]
    assert told == [True, False]
    assert not any(found[1].warnings)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_model_that_writes_to_its_inputs(who):
    (warning,) = report(**{who: Model(writes=True)}).warnings
    assert "writes to what it is called with, argument 0" in warning


def test_every_tensor_of_a_call_is_listed():
    student, teacher = Model(), Model().eval()
    distiller = fxdistill.wrap(student, teacher, {"body": "body"}, compile=AOT)
    x, wide = torch.randn(5, 8), torch.randn(5, 8, dtype=torch.float64).float()
    found = distiller.report(
        x,
        more={"mask": torch.ones(5), "past": [torch.ones(2), (torch.ones(3), "text")]},
        labels=torch.zeros(5, dtype=torch.long),
        num_items=5,
        teacher_inputs={"x": wide},
    )
    assert {name: value.shape for name, value in found.inputs.items()} == {
        "argument 0": (5, 8),
        "more.mask": (5,),
        "more.past.0": (2,),
        "more.past.1.0": (3,),
        "labels": (5,),
        "num_items": (),
        "teacher_inputs.x": (5, 8),
    }


# ---------------------------------------------------------------------- parts


class Placed(nn.Module):
    """Holds a parameter, and multiplies, beside its blocks."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.randn(6, 8))
        self.mix = nn.Parameter(torch.randn(8, 8))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
            for _ in range(3)
        )

    def forward(self, x):
        x = x @ self.mix + self.places
        for block in self.blocks:
            x = x + block(x)
        return x.mean(1)


def test_the_parts_of_a_tower_are_the_whole():
    distiller = fxdistill.wrap(
        Placed(), Placed().eval(), {"blocks.1": "blocks.1"}, logit_loss=None, compile=AOT
    )
    found = distiller.report(torch.randn(2, 6, 8))
    student = next(tower for tower in found.towers if tower.name == "student")
    own = next(block for block in student.blocks if not block.path)
    assert own.parameters == 6 * 8 + 8 * 8
    assert own.forward == 2 * 2 * 6 * 8 * 8
    assert sum(block.parameters for block in student.blocks) == student.parameters
    assert sum(block.forward for block in student.blocks) == found.flops.forward
    assert sum(block.backward for block in student.blocks) == found.flops.backward
