"""PruneTeacher: what goes, what stays."""

import pytest
import torch

import fxdistill
from fxdistill.graph.effects import effects_of
from fxdistill.graph.sections import section_of
from fxdistill.passes import PruneTeacher
from toys import MAPPING, tokens, toy_pair


def composed(kind="plain", mapping=MAPPING, **options):
    """The joint program before pruning, as a pass of the user sees it, and after."""
    seen = []

    def look(program):
        seen.append(program)
        return program

    student, teacher = toy_pair(kind)
    distiller = fxdistill.wrap(student, teacher, mapping, passes=(look,), **options)
    return seen, distiller.check(tokens()), seen[0]


def teacher_nodes(program):
    return [n for n in program.gm.graph.nodes if section_of(n) == "teacher"]


def test_the_head_and_the_layers_above_the_deepest_tap_go():
    _, after, before = composed(mapping={"blocks.0.mlp": "blocks.0.mlp"}, logit_loss=None)
    linear = torch._C._nn.linear
    assert sum(n.target is linear for n in teacher_nodes(before)) == 6
    assert sum(n.target is linear for n in teacher_nodes(after)) == 2


def test_with_a_logit_term_nothing_goes():
    _, after, before = composed(compile={"fuse_head": False})
    assert len(teacher_nodes(after)) == len(teacher_nodes(before))
    assert after.history[-1].changed is False


def test_in_place_writes_of_values_that_are_read_stay():
    _, after, _ = composed("inplace", {"blocks.0.mlp": "blocks.1.mlp"}, logit_loss=None)
    kept = [n for n in teacher_nodes(after) if n.target is torch.nn.functional.relu]
    assert len(kept) == 2


@pytest.mark.parametrize("kind", ["plain", "inplace", "alias", "twice"])
def test_is_idempotent(kind):
    _, after, _ = composed(kind, {"blocks.0.mlp": "blocks.1.mlp"}, logit_loss=None)
    assert PruneTeacher()(after) is after


def test_what_others_read_stays_although_nobody_needs_it():
    def read(program):
        """A node of the student's that is of no use reads the teacher's last one."""
        program = program.fork()
        graph, linear = program.gm.graph, torch._C._nn.linear
        theirs = [n for n in teacher_nodes(program) if n.target is linear][-1]
        with graph.inserting_before(graph.output_node()):
            node = graph.call_function(torch.neg, (theirs,))
        node.meta = {**theirs.meta, "custom": {"fxdistill": "student"}}
        return program

    distiller = fxdistill.wrap(
        *toy_pair(), {"blocks.0.mlp": "blocks.0.mlp"}, logit_loss=None, passes=(read,)
    )
    after = distiller.check(tokens())
    assert any(n.target is torch.neg for n in after.gm.graph.nodes)


def test_the_calling_convention_stays():
    _, after, before = composed(mapping={"blocks.0.mlp": "blocks.0.mlp"}, logit_loss=None)
    inputs = [[n.target for n in p.gm.graph.find_nodes(op="placeholder")] for p in (before, after)]
    assert inputs[0] == inputs[1]
    assert before.outputs == after.outputs


def test_running_statistics_of_a_teacher_that_trains_stay():
    _, after, _ = composed(
        "batchnorm", {"blocks.0.mlp": "blocks.0.mlp"}, logit_loss=None, freeze_teacher=False
    )
    norm = torch.nn.functional.batch_norm
    assert sum(n.target is norm for n in teacher_nodes(after)) == 3


def test_effects_know_running_statistics_as_writes():
    _, after, _ = composed("batchnorm")
    effects = effects_of(after.gm)
    norms = [n for n in after.gm.graph.nodes if n.target is torch.nn.functional.batch_norm]
    student = [n for n in norms if section_of(n) == "student"]
    assert len(student) == 2
    assert all(effects.writes.get(n) for n in student)
