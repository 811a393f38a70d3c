"""Graphs of the joint level: which nodes are of the forward, which have dimensions or effects."""

from collections.abc import Iterable

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from fxdistill.graph.collectives import WAIT


def is_tangent(node: fx.Node) -> bool:
    """Whether ``node`` is a tangent, by its name, as torch's partitioner decides it."""
    return node.op == "placeholder" and "tangents" in str(node.target)


def forward_of(graph: fx.Graph) -> dict[fx.Node, int]:
    """The nodes of the forward, in order, with their places: those that no tangent reaches."""
    behind: set[fx.Node] = set()
    found: dict[fx.Node, int] = {}
    for i, node in enumerate(graph.nodes):
        if is_tangent(node) or any(source in behind for source in node.all_input_nodes):
            behind.add(node)
        elif node.op != "output":
            found[node] = i
    return found


def broad(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Those of ``nodes`` whose values have dimensions, and are not computed from numbers alone.

    A stack of terms is computed from numbers alone. ``nodes`` are in order.
    """
    found: set[fx.Node] = set()
    for node in nodes:
        inputs = node.all_input_nodes
        if _has_dimensions(node) and (not inputs or not found.isdisjoint(inputs)):
            found.add(node)
    return found


def _has_dimensions(node: fx.Node) -> bool:
    values = tree_leaves(node.meta.get("val"))
    return any(isinstance(value, Tensor) and value.ndim > 0 for value in values)


def writes(node: fx.Node) -> bool:
    """Whether an operator writes: AOTAutograd copies new buffers into inputs, last of all."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def pins_order(node: fx.Node) -> bool:
    """Whether ``node`` has an effect that its users do not show.

    Such nodes are writes (``copy_`` to an input), random operators (each takes the next numbers),
    grad mode, assertions, and messages between ranks. torch counts a wait among them, to protect it
    from being erased as dead, but its only effect is the value that it returns.
    """
    return node.op == "call_function" and node.is_impure() and str(node.target) != WAIT
