"""Gather sharded parameters where they are used, and again in the backward."""

import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from fxdistill.base.figures import size
from fxdistill.graph.program import Level, P, fork_module
from fxdistill.graph.sections import section_of
from fxdistill.models.tap import Tower

# The operators between a parameter's shard and the weight that another operator reads.
_GATHER = "_c10d_functional.all_gather_into_tensor"
_SCATTER = "_c10d_functional.reduce_scatter_tensor"
_MOVES = (
    "view reshape _unsafe_view alias detach slice split split_with_sizes cat narrow clone t "
    "constant_pad_nd transpose permute as_strided unsqueeze squeeze _to_copy"
)
_ON_THE_WAY = ("_c10d_functional.wait_tensor", *(f"aten.{name}" for name in _MOVES.split()))


@dataclass(frozen=True)
class GatherLate:
    """Move the gathers of parameters to their first use, and keep none for the backward.

    1. A step gathers all of its weights before it uses the first, so the graph as traced would hold
       whole models. Each gather, with the operators before and behind it that only move data, moves
       to its first reader.
    2. For a model that learns, the partitioner is told to gather weights again in the backward
       rather than save them in the forward (FSDP calls this resharding after the forward).
    3. Gradients are scattered as soon as they are computed. As traced, that would come last, since
       autograd works backwards from a forward that begins with the gathers.

    A graph without gathered parameters is returned as it is. ``teachers`` names the frozen models.
    """

    teachers: tuple[Tower, ...] = ("teacher",)
    level: ClassVar[Level] = "joint"

    def __call__(self, program: P) -> P:
        """Move gathers and scatters, and mark gathered weights for recomputation."""
        if not any(_operator(node) == _GATHER for node in program.gm.graph.nodes):
            return program
        gm = fork_module(program.gm)
        leading, gathered = _gathers(gm.graph)
        if not gathered:
            return program
        _reorder(gm.graph, leading, _scatters(gm.graph))
        for node in gathered:
            if section_of(node) not in self.teachers:
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
                node.meta["ac_graph_id"] = 0
        bytes_of = sum(_bytes(node) for node in gathered if _operator(node) == _GATHER)
        count = sum(_operator(node) == _GATHER for node in gathered)
        remark = (
            f"{count} gathers of parameters ({size(bytes_of)}) at their first use, not all at once"
        )
        return replace(program, gm=gm, remarks=(*program.remarks, remark))


def _operator(node: fx.Node) -> str:
    return str(node.target).rsplit(".", 1)[0] if node.op == "call_function" else ""


def _bytes(node: fx.Node) -> int:
    value: Any = node.meta["val"]
    return int(value.numel() * value.element_size())


def _moves(node: fx.Node) -> bool:
    return _operator(node) in _ON_THE_WAY or node.target is operator.getitem


def _gathers(graph: fx.Graph) -> tuple[set[fx.Node], set[fx.Node]]:
    """The gathers of inputs with the data moves around them, and the gathered values alone."""
    pure: set[fx.Node] = set()
    gathered: set[fx.Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        if not sources or not (_operator(node) == _GATHER or _moves(node)):
            continue
        if all(source.op == "placeholder" or source in pure for source in sources):
            pure.add(node)
            if _operator(node) == _GATHER or any(source in gathered for source in sources):
                gathered.add(node)
    return _with_leads(graph, gathered, pure), gathered


def _scatters(graph: fx.Graph) -> set[fx.Node]:
    """The scatters of gradients, with the data moves before and behind them."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        behind = _moves(node) and any(source in found for source in node.all_input_nodes)
        if _operator(node) == _SCATTER or behind:
            found.add(node)
    return _with_leads(graph, found, {node for node in graph.nodes if _moves(node)})


def _with_leads(graph: fx.Graph, found: set[fx.Node], among: set[fx.Node]) -> set[fx.Node]:
    """``found``, and those nodes of ``among`` that only lead there."""
    leads = set(found)
    for node in reversed(list(graph.nodes)):
        if node in among and node.users and all(user in leads for user in node.users):
            leads.add(node)
    return leads


def _reorder(graph: fx.Graph, late: set[fx.Node], early: set[fx.Node]) -> None:
    """Put each node of ``late`` before its first reader, of ``early`` behind its last input."""
    nodes = list(graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    at = dict(place)
    for node in reversed(nodes):
        if node in late:
            at[node] = min((at[user] for user in node.users), default=place[node])
    for node in nodes:
        if node in early and node not in late:
            at[node] = max((at[source] for source in node.all_input_nodes), default=place[node])

    def key(node: fx.Node) -> tuple[int, int, int]:
        return at[node], 0 if node in late else 2 if node in early else 1, place[node]

    end = graph.output_node()
    for node in sorted(nodes, key=key):
        if node is not end:
            end.prepend(node)
