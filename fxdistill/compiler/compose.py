"""Compose the models' programs and the objective into a JointProgram: one graph, one total."""

from typing import Any

from torch import fx

from fxdistill.compiler.split import EDGE
from fxdistill.errors import TapError
from fxdistill.graph.joint import JointProgram
from fxdistill.graph.program import Program, graph_module, output_values
from fxdistill.graph.sections import SECTION
from fxdistill.models.tap import Section


def compose(captured: fx.GraphModule, programs: dict[str, Program]) -> JointProgram:
    """Inline the models, then the objective, which reads the outputs that the models expose.

    The graph has all placeholders of ``captured``, in order, even unused ones: dynamo calls it so.
    """
    graph, env = fx.Graph(), {}
    for node in captured.graph.find_nodes(op="placeholder"):
        env[node.name] = graph.node_copy(node)
        env[node.name].meta = dict(node.meta)
    attributes: dict[str, Any] = {}
    for section, program in programs.items():
        values = _inline(graph, program, env, section, attributes)
        for name, value in zip(program.outputs, values, strict=True):
            edge = name.startswith(EDGE)
            env[name.removeprefix(EDGE) if edge else f"{section}:{name}"] = value
    graph.output(tuple(values))
    gm = graph_module(attributes, graph, "Joint")
    gm.meta.update(captured.meta)
    outputs = tuple(name.removeprefix(EDGE) for name in program.outputs)
    joint = JointProgram(gm, outputs, title="joint")
    joint.gm.graph.lint()
    return joint


def _inline(
    graph: fx.Graph,
    program: Program,
    env: dict[str, Any],
    section: Section,
    attributes: dict[str, Any],
) -> list[Any]:
    """Copy a program's nodes into ``graph`` and return the values of its outputs."""
    local: dict[fx.Node, Any] = {}
    for node in program.gm.graph.nodes:
        if node.op == "placeholder":
            local[node] = _found(env, node)
        elif node.op != "output":
            copy = local[node] = graph.node_copy(node, lambda n: local[n])
            copy.meta = _labelled(node, section)
            if node.op == "get_attr":
                value = attributes[node.target] = _attribute(program.gm, node.target)
                _label_region(value, section)
    return [local[v] if isinstance(v, fx.Node) else v for v in output_values(program.gm.graph)]


def _labelled(node: fx.Node, section: Section) -> dict[str, Any]:
    return {**node.meta, "custom": {**node.meta.get("custom", {}), SECTION: section}}


def _label_region(value: Any, section: Section) -> None:
    """Label the operators of a checkpointed region too; their gradients inherit the label."""
    if isinstance(value, fx.GraphModule):
        for module in value.modules():
            if isinstance(module, fx.GraphModule):
                for node in module.graph.nodes:
                    node.meta = _labelled(node, section)


def _found(env: dict[str, Any], placeholder: fx.Node) -> Any:
    source = _source(placeholder)
    if source not in env and (tapped := placeholder.meta.get("tap")) is not None:
        section, tap = tapped
        raise TapError(
            f"{section} {str(tap)!r} runs inside a loop, a branch or a region of the graph (scan, "
            "cond, invoke_subgraph, a custom autograd function): its values do not leave it. Match "
            "the module around it."
        )
    return env[source]


def _source(placeholder: fx.Node) -> str:
    if (tapped := placeholder.meta.get("tap")) is not None:
        section, tap = tapped
        return f"{section}:{tap}"
    return str(placeholder.target)


def _attribute(gm: fx.GraphModule, target: str) -> Any:
    value: Any = gm
    for name in target.split("."):
        value = getattr(value, name)
    return value
