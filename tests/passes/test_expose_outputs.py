"""ExposeOutputs: what it names, what it clones, what it leaves alone."""

import pytest
import torch

import fxdistill
from fxdistill.graph.effects import CHECKPOINT
from fxdistill.passes import ExposeOutputs
from fxdistill.taps.markers import is_tap
from toys import tokens, toy_pair


def exposed(kind="plain", only=("blocks.*.mixer",), **options):
    student, _ = toy_pair(kind, **options)
    program = fxdistill.trace(student, tokens())
    return program, fxdistill.run(program, (ExposeOutputs(only),))


def clones(program):
    return [n for n in program.gm.graph.nodes if n.target is torch.clone]


def test_adds_the_module_outputs_after_the_existing_ones():
    before, after = exposed()
    assert after.outputs == ("output_0", "blocks.0.mixer", "blocks.1.mixer")
    assert after.history[-1].added == ("blocks.0.mixer", "blocks.1.mixer")
    assert before.outputs == ("output_0",)


def test_erases_every_marker_and_leaves_its_argument_as_it_was():
    before, after = exposed()
    assert not any(is_tap(node) for node in after.gm.graph.nodes)
    assert any(is_tap(node) for node in before.gm.graph.nodes)


def test_returns_its_argument_when_there_is_no_marker():
    _, after = exposed()
    assert ExposeOutputs()(after) is after


def test_second_calls_are_numbered():
    _, after = exposed("twice", only=("blocks.0.mlp*",))
    assert after.outputs == ("output_0", "blocks.0.mlp", "blocks.0.mlp@1")


@pytest.mark.parametrize(("kind", "cloned"), [("plain", 0), ("inplace", 2), ("alias", 2)])
def test_clones_what_is_written_later_and_nothing_else(kind, cloned):
    _, after = exposed(kind)
    assert len(clones(after)) == cloned


def test_values_leave_checkpointed_regions_that_stay_checkpointed():
    _, after = exposed(remat=True)
    regions = [n for n in after.gm.graph.nodes if n.target is CHECKPOINT]
    assert len(regions) == 2
    assert after.outputs[1:] == ("blocks.0.mixer", "blocks.1.mixer")


def test_placeholders_are_the_parameters_by_reference():
    before, after = exposed()
    names = [[n.target for n in p.gm.graph.nodes if n.op == "placeholder"] for p in (before, after)]
    assert names[0] == names[1]
