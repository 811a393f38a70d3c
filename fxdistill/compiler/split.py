"""Split a captured graph into a program for each model and one for the objective."""

from typing import Any

from torch import fx

from fxdistill.graph.program import Program, graph_module, output_values
from fxdistill.models.tap import Tap
from fxdistill.taps.markers import CHECKS, begin, named, tapped

EDGE = "edge:"


def split(gm: fx.GraphModule) -> dict[str, Program]:
    """Cut ``gm`` at its ``begin`` markers.

    A section's placeholders have the names of the outside nodes that it reads; for a ``tapped``
    node, ``meta["tap"]`` says which tap it is. A section's outputs are the nodes that other
    sections read, called ``edge:name``; the objective's are the outputs of ``gm``, in order.
    """
    section_of, names = _sections(gm.graph)
    returned = output_values(gm.graph)
    programs = {}
    for name in names:
        nodes = [n for n, section in section_of.items() if section == name]
        graph, env = _extract(nodes, set(nodes))
        if name == names[-1]:
            values = [_as_output(value, env, graph) for value in returned]
            outputs = [_output_name(value, i) for i, value in enumerate(returned)]
        else:
            read = [n for n in nodes if any(section_of.get(u, "") != name for u in n.users)]
            values, outputs = [env[n] for n in read], [EDGE + n.name for n in read]
        graph.output(tuple(values))
        programs[name] = Program(_module(gm, graph, name), tuple(outputs), title=name)
    return programs


def _sections(graph: fx.Graph) -> tuple[dict[fx.Node, str], list[str]]:
    """The section of every operator, and the names of the sections in order."""
    names = [str(n.args[0]) for n in graph.nodes if n.op == "call_function" and n.target is begin]
    current, section_of = names[0], {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target is begin:
            current = str(node.args[0])
        elif node.op not in ("placeholder", "output") and node.target not in CHECKS:
            section_of[node] = current
    return section_of, names


def _extract(nodes: list[fx.Node], inside: set[fx.Node]) -> tuple[fx.Graph, dict[fx.Node, Any]]:
    """Copy ``nodes`` into a graph of their own, which reads other nodes through placeholders."""
    graph = fx.Graph()
    env: dict[Any, Any] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in inside and source not in env:
                env[source] = _placeholder(graph, source)
        if node.op == "call_function" and node.target is tapped:
            section, path, port, call = (str(argument) for argument in node.args)
            env[node] = _placeholder(graph, node)
            env[node].meta["tap"] = (section, Tap(path, port, int(call)))
        elif node.op == "call_function" and node.target is named:
            env[node] = env[node.args[0]]
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
            env[node].meta = dict(node.meta)
    return graph, env


def _placeholder(graph: fx.Graph, source: fx.Node) -> fx.Node:
    """Add a placeholder behind the others: above all operators, in the order of first use."""
    last = next((n for n in reversed(graph.nodes) if n.op == "placeholder"), None)
    where = graph.inserting_after(last) if last else graph.inserting_before(_first(graph))
    with where:
        node = graph.create_node("placeholder", source.name, name=source.name)
    node.meta = dict(source.meta)
    return node


def _first(graph: fx.Graph) -> Any:
    return next(iter(graph.nodes), graph._root)


def _as_output(value: Any, env: dict[fx.Node, Any], graph: fx.Graph) -> Any:
    """The node of the objective that computes or reads an output of the whole graph."""
    if not isinstance(value, fx.Node):
        return value
    if value not in env:
        env[value] = _placeholder(graph, value)
    return env[value]


def _output_name(value: Any, index: int) -> str:
    if isinstance(value, fx.Node) and value.target is named:
        return str(value.args[1])
    return f"{EDGE}{index}"


def _module(gm: fx.GraphModule, graph: fx.Graph, name: str) -> fx.GraphModule:
    """A graph module that shares the attributes of ``gm``."""
    return graph_module(gm, graph, name.capitalize())
