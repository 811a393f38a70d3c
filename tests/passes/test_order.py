"""The list of what runs when: every pass is of the level of its stage, and runs on no other."""

from dataclasses import dataclass

import pytest
import torch
from torch import fx

import fxdistill
from fxdistill import passes
from fxdistill.errors import OptionError, PassError
from fxdistill.graph.pipeline import run
from fxdistill.graph.program import Program
from fxdistill.passes.order import ORDER, Wanted, passes_at
from toys import MAPPING, tokens, toy_pair

ALL = [getattr(passes, name) for name in passes.__all__]
LEVELS = {
    "each model": "captured",
    "joint": "captured",
    "terms": "captured",
    "step": "joint",
    "terms step": "joint",
}
WANTED = Wanted(gathers=True)


def program(level):
    graph = fx.Graph()
    graph.output((graph.placeholder("x"),))
    return Program(fx.GraphModule({}, graph), ("x",), level=level, title="a graph")


@pytest.mark.parametrize("stage", LEVELS)
def test_passes_of_a_stage_are_of_its_level(stage):
    found = passes_at(stage, WANTED)
    assert found
    assert {p.level for p in found} == {LEVELS[stage]}


def test_every_pass_has_a_place_and_a_reason():
    listed = {type(p) for stage in LEVELS for p in passes_at(stage, WANTED)}
    assert listed == set(ALL)
    assert all(slot.why for slot in ORDER)


def test_what_is_not_wanted_does_not_run():
    few = Wanted(fuse_head=False, frozen=())
    names = {type(p).__name__ for stage in LEVELS for p in passes_at(stage, few)}
    assert not names & {"FuseHead", "GatherLate", "KeepTeacher"}


@pytest.mark.parametrize("kind", ALL)
def test_a_pass_is_refused_on_the_other_level(kind):
    other = {"captured": "joint", "joint": "captured"}[kind.level]
    with pytest.raises(PassError, match=f"{kind.__name__} works on the {kind.level} level"):
        run(program(other), [kind()])


def test_a_pass_that_does_not_say_its_level_runs_on_both():
    def plain(given):
        return given

    for level in ("captured", "joint"):
        assert run(program(level), [plain]).history[0].name == "plain"


@dataclass(frozen=True)
class OfTheUser:
    level = "joint"

    def __call__(self, given):
        return given


def test_a_pass_of_the_wrong_level_is_refused_by_wrap():
    with pytest.raises(OptionError, match="OfTheUser works on the joint level"):
        fxdistill.wrap(*toy_pair(), passes=(OfTheUser(),), compile={"backend": "aot_eager"})


def test_the_users_pass_runs_first_and_pruning_last():
    seen = []

    def mine(given):
        seen.append({n.target for n in given.gm.graph.nodes if n.op == "call_function"})
        return given

    compile = {"backend": "aot_eager"}
    made = fxdistill.wrap(*toy_pair(), MAPPING, passes=(mine,), compile=compile)
    program = made.check(tokens())
    names = [record.name for record in program.history]
    ours = ["FuseHead", "FormGradients", "PruneTeacher"]
    assert names == ["ExposeOutputs", "ExposeOutputs", "mine", *ours]
    assert fxdistill.losses.forward_kl in seen[0]
    assert fxdistill.losses.vocab_loss not in seen[0]
    assert isinstance(program.gm, torch.fx.GraphModule)
