"""Pack the all-reduces of scalars, so that several scalars take one collective.

This file does not import torch.distributed: a pack uses the operators that the graph already has.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.node import map_arg

from fxdistill.graph.collectives import reduces_a_number
from fxdistill.graph.program import Level, P, fork_module
from fxdistill.graph.traced import broad, is_tangent, pins_order

# Metadata that decides where the partitioner puts a node: only nodes that agree in it are packed.
PLACES = ("partitioner_tag", "recompute", "ac_graph_id")
# Metadata about a member's tensors, which does not hold for the pack.
STALE = ("tensor_meta", "eager_input_vals")


@dataclass(frozen=True)
class PackReductions:
    """Replace several all-reduces of scalars by one.

    On a mesh, every term ends in a sum of one number over ranks, and a collective of one number
    takes as long as one of a hundred.

    1. Candidates are the all-reduces of 0-d tensors that are followed directly by their waits.
    2. A pack has candidates of one operation, group, dtype and device, none of which depends on
       another. It mixes no values of the forward with gradients.
    3. The pack stands where its last member stood. Readers of an earlier member move behind the
       pack if they are arithmetic on scalars; any other reader closes the pack before it. Nothing
       moves across a write or a random operator.
    4. All ranks must form the same packs, or they would wait for each other forever. Their graphs
       may differ in the sizes of local tensors, so only the number of dimensions counts: a tensor
       of shape [1] is not a scalar.
    """

    level: ClassVar[Level] = "joint"

    def __call__(self, program: P) -> P:
        """Pack the all-reduces; a program with nothing to pack is returned as it is."""
        if sum(reduces_a_number(node) for node in program.gm.graph.nodes) < 2:
            return program
        gm = fork_module(program.gm)
        found = [pack for pack in _packs(gm.graph) if len(pack.members) > 1]
        if not found:
            return program
        for pack in found:
            _write(gm.graph, pack.members)
        _sort(gm.graph)
        remarks = (_remark(pack.members) for pack in found)
        return replace(program, gm=gm, remarks=(*program.remarks, *remarks))


def _remark(members: Sequence[fx.Node]) -> str:
    operation = members[0].args[1]
    what = "sums" if operation == "sum" else f"reductions ({operation})"
    return f"{len(members)} {what} over ranks in one"


@dataclass(eq=False)
class _Pack:
    """All-reduces that become one all-reduce."""

    kind: tuple[Any, ...]
    members: list[fx.Node] = field(default_factory=list)
    needs: "set[_Pack]" = field(default_factory=set)  # packs that must come before it
    open: bool = True


def _packs(graph: fx.Graph) -> list[_Pack]:
    """Packs of all all-reduces of scalars, each of which joins the first pack that can take it."""
    packs: list[_Pack] = []
    behind: dict[fx.Node, frozenset[_Pack]] = {}  # the packs that a node depends on
    gradients: set[fx.Node] = set()
    wide = broad(graph.nodes)
    for node in graph.nodes:
        inputs = node.all_input_nodes
        needs = behind[node] = _union([behind[x] for x in inputs])
        if is_tangent(node) or not gradients.isdisjoint(inputs):
            gradients.add(node)
        if pins_order(node):
            _close(packs)
        elif node in wide and any(pack.open for pack in needs):
            _close(_with_needs(needs))
        if reduces_a_number(node):
            pack = _pack_for(packs, _kind(node, node in gradients), needs)
            pack.members.append(node)
            pack.needs |= needs
            behind[node] = frozenset((pack,))
    return packs


def _pack_for(packs: list[_Pack], kind: tuple[Any, ...], needs: Iterable[_Pack]) -> _Pack:
    """The first open pack of this kind that need not precede ``needs``, or else a new one.

    Packs that end up with one member count like others here: they, too, order what depends on them.
    """
    before = _with_needs(needs)
    for pack in packs:
        if pack.open and pack.kind == kind and pack not in before:
            return pack
    packs.append(_Pack(kind))
    return packs[-1]


def _with_needs(packs: Iterable[_Pack]) -> set[_Pack]:
    """``packs``, and all packs that must come before them."""
    found: set[_Pack] = set()
    to_do = list(packs)
    while to_do:
        pack = to_do.pop()
        if pack not in found:
            found.add(pack)
            to_do += pack.needs
    return found


def _close(packs: Iterable[_Pack]) -> None:
    for pack in packs:
        pack.open = False


def _union(sets: Sequence[frozenset[_Pack]]) -> frozenset[_Pack]:
    return frozenset().union(*sets) if any(sets) else frozenset()


def _kind(node: fx.Node, is_gradient: bool) -> tuple[Any, ...]:
    """The properties that all members of a pack share."""
    value, (_, operation, group) = node.meta["val"], node.args
    place = [node.meta.get(name) for name in PLACES]
    return (operation, group, value.dtype, value.device, is_gradient, *place)


def _write(graph: fx.Graph, members: Sequence[fx.Node]) -> None:
    """Replace ``members`` by one all-reduce, in the place of the last of them."""
    aten, last = torch.ops.aten, members[-1]
    waits = [list(node.users) for node in members]
    with graph.inserting_before(last):
        # No stack: Inductor has no code for it, and decompositions have already run.
        rows = [_call(graph, node, aten.unsqueeze.default, node.args[0], 0) for node in members]
        row = _call(graph, last, aten.cat.default, rows)
        reduced = _call(graph, last, last.target, row, *last.args[1:])
        waited = _call(graph, waits[-1][0], waits[-1][0].target, reduced)
        for i, old in enumerate(waits):
            view = _call(graph, old[0], aten.select.int, waited, 0, i)
            # Returned terms must not share memory: if the user writes to one in place, that would
            # also change the values that autograd has saved of the others.
            own = _call(graph, old[0], aten.clone.default, view)
            for wait in old:
                wait.replace_all_uses_with(own)
    for node in (*(wait for old in waits for wait in old), *members):
        graph.erase_node(node)


def _call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A node with the metadata of ``like``, and a value of its own."""
    node = graph.call_function(target, args)
    node.meta = {key: value for key, value in like.meta.items() if key not in STALE}
    on_fakes: Callable[..., Any] = target  # run on fake tensors, for shape and dtype
    node.meta["val"] = on_fakes(*map_arg(args, lambda x: x.meta["val"]))
    return node


def _sort(graph: fx.Graph) -> None:
    """Put every node behind its inputs, and otherwise keep the order of the graph.

    The next node is always the first whose inputs are there. So a node moves only if it, or a node
    that it depends on, waits for a pack. No node between the members of a pack pins the order (it
    would have closed the pack), so nodes that move cross none that does. The new order of
    collectives follows from their old order and their dependencies, which are the same on all
    ranks.
    """
    nodes = list(graph.nodes)
    index = {node: i for i, node in enumerate(nodes)}
    missing = [len(node.all_input_nodes) for node in nodes]
    ready = [i for i, count in enumerate(missing) if not count]
    heapify(ready)
    order: list[fx.Node] = []
    while ready:
        node = nodes[heappop(ready)]
        order.append(node)
        for user in node.users:
            missing[index[user]] -= 1
            if not missing[index[user]]:
                heappush(ready, index[user])
    assert len(order) == len(nodes), "packs that wait for each other"
    for before, node in pairwise(order):
        if before.next is not node:
            before.append(node)
