"""Scalars that are summed over ranks travel together.

Nothing here imports torch.distributed: operators are told by their names, and those of a pack are
the ones that the graph has.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from fxdistill.graph.program import Level, P, fork_module

REDUCE = "_c10d_functional.all_reduce.default"
WAIT = "_c10d_functional.wait_tensor.default"
# Where the partitioner puts a node: what is told apart by these is not packed together.
PLACES = ("partitioner_tag", "recompute", "ac_graph_id")
# What is said of one node's inputs, and does not hold for its pack.
STALE = ("tensor_meta", "eager_input_vals")


@dataclass(frozen=True)
class PackReductions:
    """Make one all-reduce of several all-reduces of scalars.

    On a mesh every term ends in a sum over ranks of one number, and one number takes as long as a
    hundred.

    1. What is sought: an all-reduce of a 0-d tensor that is waited for, with nothing in between.
    2. Packed are those of one operation, group, type and device, none of which depends on another:
       values of the forward with values of the forward, gradients with gradients.
    3. The pack stands where its last member stood. What reads an earlier one moves behind it, if
       that is arithmetic on scalars; where it is anything else, the pack ends before it. Nothing
       moves across a write or a random operator.
    4. All ranks must come to the same packs, or they wait for each other forever, and their graphs
       may differ in the sizes of what is here: so only the number of dimensions counts, and [1]
       is no scalar.
    """

    level: ClassVar[Level] = "joint"

    def __call__(self, program: P) -> P:
        """Pack; a program with nothing to pack is returned as it is."""
        if sum(_is_scalar_reduction(node) for node in program.gm.graph.nodes) < 2:
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


def _is_scalar_reduction(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and str(node.target) == REDUCE
        and len(node.args) == 3
        and not node.kwargs
        and isinstance(node.meta.get("val"), Tensor)
        and node.meta["val"].ndim == 0
        and bool(node.users)
        and all(str(user.target) == WAIT for user in node.users)
    )


@dataclass(eq=False)
class _Pack:
    """All-reduces that become one."""

    kind: tuple[Any, ...]
    members: list[fx.Node] = field(default_factory=list)
    needs: "set[_Pack]" = field(default_factory=set)  # packs that must come before it
    open: bool = True


def _packs(graph: fx.Graph) -> list[_Pack]:
    """Every all-reduce of a scalar, each in the first pack that can take it."""
    packs: list[_Pack] = []
    behind: dict[fx.Node, frozenset[_Pack]] = {}  # the packs that a node depends on
    gradients: set[fx.Node] = set()
    broad: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        needs = behind[node] = _union([behind[x] for x in inputs])
        if _is_tangent(node) or not gradients.isdisjoint(inputs):
            gradients.add(node)
        # A value with dimensions, unless it is made of scalars, as a stack of terms is.
        if _has_dimensions(node) and (not inputs or not broad.isdisjoint(inputs)):
            broad.add(node)
        if _pins_order(node):
            _close(packs)
        elif node in broad and any(pack.open for pack in needs):
            _close(_with_needs(needs))
        if _is_scalar_reduction(node):
            pack = _pack_for(packs, _kind(node, node in gradients), needs)
            pack.members.append(node)
            pack.needs |= needs
            behind[node] = frozenset((pack,))
    return packs


def _pack_for(packs: list[_Pack], kind: tuple[Any, ...], needs: Iterable[_Pack]) -> _Pack:
    """The first pack of this kind that takes more and does not come before ``needs``; or a new one.

    Packs that stay alone are packs like others here: they, too, order what is behind them.
    """
    before = _with_needs(needs)
    for pack in packs:
        if pack.open and pack.kind == kind and pack not in before:
            return pack
    packs.append(_Pack(kind))
    return packs[-1]


def _with_needs(packs: Iterable[_Pack]) -> set[_Pack]:
    """``packs``, and all that must come before them."""
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
    """What is alike in all members of a pack."""
    value, (_, operation, group) = node.meta["val"], node.args
    place = [node.meta.get(name) for name in PLACES]
    return (operation, group, value.dtype, value.device, is_gradient, *place)


def _is_tangent(node: fx.Node) -> bool:
    """As torch's partitioner tells them: by their names."""
    return node.op == "placeholder" and "tangents" in str(node.target)


def _has_dimensions(node: fx.Node) -> bool:
    values = tree_leaves(node.meta.get("val"))
    return any(isinstance(value, Tensor) and value.ndim > 0 for value in values)


def _pins_order(node: fx.Node) -> bool:
    """What has an effect that its users do not show.

    These are writes (``copy_`` to an input), random operators (each takes the next numbers), grad
    mode, assertions, messages from rank to rank. A wait counts as one for torch, lest it be erased
    as dead; it is no more than a value of its input.
    """
    return node.op == "call_function" and node.is_impure() and str(node.target) != WAIT


def _write(graph: fx.Graph, members: Sequence[fx.Node]) -> None:
    """One all-reduce before the last of ``members``, in place of them all."""
    aten, last = torch.ops.aten, members[-1]
    waits = [list(node.users) for node in members]
    with graph.inserting_before(last):
        # Operators that Inductor has code for: what it decomposes (stack) is decomposed by now.
        rows = [_call(graph, node, aten.unsqueeze.default, node.args[0], 0) for node in members]
        row = _call(graph, last, aten.cat.default, rows)
        reduced = _call(graph, last, last.target, row, *last.args[1:])
        waited = _call(graph, waits[-1][0], waits[-1][0].target, reduced)
        for i, old in enumerate(waits):
            view = _call(graph, old[0], aten.select.int, waited, 0, i)
            # Terms that are returned must not share memory: a write to one, by whoever gets it,
            # would be a write to what autograd has saved of the others.
            own = _call(graph, old[0], aten.clone.default, view)
            for wait in old:
                wait.replace_all_uses_with(own)
    for node in (*(wait for old in waits for wait in old), *members):
        graph.erase_node(node)


def _call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A node whose metadata is that of ``like``, but for its value."""
    node = graph.call_function(target, args)
    node.meta = {key: value for key, value in like.meta.items() if key not in STALE}
    on_fakes: Callable[..., Any] = target  # the value of a fake tensor is its shape
    node.meta["val"] = on_fakes(*map_arg(args, lambda x: x.meta["val"]))
    return node


def _sort(graph: fx.Graph) -> None:
    """Put every node behind its inputs; what can keep its place among the others keeps it.

    Always the first of those whose inputs are there: a node moves only where it, or what it
    depends on, waits for a pack. Between the members of a pack nothing pins the order (the pack
    would have been closed there), so what moves passes nothing that does. And the order in which
    collectives come follows from their order before and from what depends on what, which are alike
    on all ranks.
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
