"""The joint level: passes run there, and what they are for holds."""

import functorch.compile
import pytest
import torch
from torch import fx

import fxdistill
from fxdistill.compiler import lower
from fxdistill.graph.sections import section_of
from fxdistill.passes import KeepTeacher
from toys import MAPPING, assert_same_gradients, gradients, tokens, toy_pair


@pytest.fixture
def backwards(monkeypatch):
    """Every backward graph that the partitioner makes."""
    graphs = []
    partition = functorch.compile.min_cut_rematerialization_partition

    def record(gm, *args, **kwargs):
        forward, backward = partition(gm, *args, **kwargs)
        graphs.append(backward)
        return forward, backward

    monkeypatch.setattr(lower, "min_cut_rematerialization_partition", record)
    return graphs


def from_teacher(graph):
    """What computes something: views of saved values cost nothing."""
    calls = [n for n in graph.graph.nodes if n.op == "call_function" and section_of(n) == "teacher"]
    return [n for n in calls if not getattr(n.target, "is_view", False)]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("budget", [0.0, 0.1])
def test_the_teacher_is_not_recomputed_in_the_backward(backwards, monkeypatch, keep, budget):
    if not keep:
        monkeypatch.setattr(KeepTeacher, "__call__", lambda self, program: program)
    student, teacher = toy_pair()
    # With logits there is more of the teacher that the backward could want.
    compile = {"backend": "aot_eager", "fuse_head": False}
    distiller = fxdistill.wrap(student, teacher, MAPPING, compile=compile)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        distiller(tokens()).loss.backward()
    assert bool(from_teacher(backwards[0])) is not keep
    reference = toy_pair()
    fxdistill.wrap(*reference, MAPPING, compile=False)(tokens()).loss.backward()
    assert_same_gradients(gradients(student), gradients(reference[0]))


def test_the_joint_passes_are_recorded():
    distiller = fxdistill.wrap(*toy_pair(), MAPPING, compile={"backend": "aot_eager"})
    distiller(tokens()).loss.backward()
    assert [r.name for r in distiller.program.history] == [
        "ExposeOutputs",
        "ExposeOutputs",
        "FuseHead",
        "FormGradients",
        "PruneTeacher",
        "MeetEarly",
        "KeepTeacher",
        "SumEarly",
        "PackReductions",
        "CountCollectives",
    ]
    assert [r.changed for r in distiller.program.history[-4:]] == [True, False, False, False]


@pytest.mark.slow
def test_inductor_runs_the_joint_passes_and_takes_its_options():
    student, teacher = toy_pair()
    options = {"options": {"epilogue_fusion": False}, "mode": "reduce-overhead"}
    distiller = fxdistill.wrap(student, teacher, MAPPING, compile=options)
    distiller(tokens()).loss.backward()
    assert "KeepTeacher" in [r.name for r in distiller.program.history]
    reference = toy_pair()
    fxdistill.wrap(*reference, MAPPING, compile=False)(tokens()).loss.backward()
    assert_same_gradients(gradients(student), gradients(reference[0]))


def test_meshes_are_saved_behind_tensors_and_before_numbers():
    values = {"loss": torch.ones(()), "a": torch.ones(2), "mesh": object(), "state": torch.ones(3)}
    made = fx.Graph()
    nodes = {name: made.placeholder(name) for name in [*values, "size"]}
    for name, node in nodes.items():
        node.meta["val"] = values.get(name, 4)
    made.output(tuple(nodes.values()))
    used = fx.Graph()
    for name in ("size", "a", "mesh", "state", "tangents_1", "seed"):
        used.placeholder(name)
    used.output(())
    parts = [fx.GraphModule({}, graph) for graph in (made, used)]
    forward, backward = lower._meshes_last(*parts, 1)
    saved = [node.name for node in forward.graph.output_node().args[0]]
    assert saved == ["loss", "a", "state", "mesh", "size"]
    taken = [node.name for node in backward.graph.find_nodes(op="placeholder")]
    assert taken == ["size", "a", "state", "mesh", "tangents_1", "seed"]
    forward.graph.lint()
    backward.graph.lint()
