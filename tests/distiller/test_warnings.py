"""Warnings name the line of the user's that led to them, from wherever they come."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import fxdistill
from fxdistill import Match
from toys import AOT, tokens, toy_pair

HOME = Path(fxdistill.__file__).parent
OPTIONS = {"logit_loss": None, "label_loss": None, "task": "causal_lm"}


def frozen_pair():
    """A student whose matched value depends on nothing that learns."""
    student, teacher = toy_pair()
    student.embed.requires_grad_(False)
    student.blocks[0].requires_grad_(False)
    return student, teacher


def a_call(compile):
    mapping = {"blocks.0.mlp": "blocks.0.mlp", "blocks.1.mlp": "blocks.1.mlp"}
    distiller = fxdistill.wrap(*frozen_pair(), mapping, compile=compile, **OPTIONS)
    return lambda: distiller(tokens())


def inside_of_compiled_code(compile):
    call = a_call(compile)
    run = torch.compile(lambda: call().loss * 2, backend="aot_eager")
    return lambda: run()


def a_check(compile):
    mapping = {"blocks.0.mlp": "blocks.0.mlp", "blocks.1.mlp": "blocks.1.mlp"}
    distiller = fxdistill.wrap(*frozen_pair(), mapping, compile=compile, **OPTIONS)
    return lambda: distiller.check(tokens())


def a_weight(compile):
    match = Match("blocks.0.mlp", "blocks.0.mlp", weight=0.0)
    student, teacher = toy_pair()
    return lambda: fxdistill.wrap(student, teacher, [match], compile=compile, **OPTIONS)


def a_shared_part(compile):
    student, teacher = toy_pair()
    teacher.embed = student.embed
    return lambda: fxdistill.wrap(student, teacher, compile=compile)


class Breaks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.layer(x)


def a_fallback(compile):
    given = {**AOT, "fallback": "regional"}
    distiller = fxdistill.wrap(Breaks(), Breaks(), compile=given, task="classification")
    return lambda: distiller(torch.randn(2, 4))


CASES = [
    *((a_call, mode) for mode in (False, AOT)),
    (inside_of_compiled_code, False),
    (a_check, AOT),
    (a_weight, False),
    (a_shared_part, False),
    (a_fallback, None),
]


@pytest.mark.filterwarnings("ignore:Dynamo")
@pytest.mark.parametrize(("make", "compile"), CASES)
def test_a_warning_names_the_line_that_led_to_it(make, compile):
    act = make(compile)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        act()
    ours = [w for w in given if not issubclass(w.category, DeprecationWarning)]
    assert ours
    assert {w.filename for w in ours} == {__file__}


def test_no_warning_goes_around_that():
    """Only the command line gives warnings of its own: its user has no line."""
    files = [path for path in HOME.rglob("*.py") if path.parent.name != "cli"]
    direct = [p.name for p in files if re.search(r"\bwarnings\.warn\(", p.read_text("utf-8"))]
    assert direct == ["warn.py"]
