"""Make the values of matched modules named outputs of the graph."""

import fnmatch
import operator
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from fxdistill.base.transforms import steps_of
from fxdistill.graph.effects import CHECKPOINT, Effects, effects_of
from fxdistill.graph.program import Level, P, all_nodes, fork_module, output_values
from fxdistill.models.tap import Tap
from fxdistill.taps.markers import LOCAL, is_tap


@dataclass(frozen=True)
class ExposeOutputs:
    """Return tapped values, after the existing outputs, and erase the markers.

    1. A value is named ``path``, with ``@k`` for the k-th further call of its module, and with
       ``:port`` for any other port than the output.
    2. A value in a checkpointed region becomes one more output of the region, which stays
       checkpointed.
    3. A value that is written later, directly or through an alias, is cloned where it was tapped.
       So is a value in an input's storage, which another model may write.
    4. A value within ``torch.vmap`` or ``torch.func`` is not exposed, but its call is counted.
    5. A module that runs in a loop or a branch (``scan``, ``cond``) is not exposed at all, because
       it is unknown how often it runs.

    ``only`` restricts the exposed values to names that match one of its patterns; the markers of
    the others are erased too.
    """

    only: tuple[str, ...] | None = None
    level: ClassVar[Level] = "captured"

    def __call__(self, program: P) -> P:
        """Expose the tapped values; a program without markers is returned as it is."""
        if not any(is_tap(node) for node in all_nodes(program.gm)):
            return program
        gm = fork_module(program.gm)
        effects = effects_of(gm)
        hoisted = _hoist(gm, effects, _Calls(), self._wants)
        found = {str(tap): node for tap, node in hoisted.items()}
        new = {name: node for name, node in found.items() if name not in program.outputs}
        out = gm.graph.output_node()
        out.args = ((*output_values(gm.graph), *new.values()),)
        return replace(program, gm=gm, outputs=(*program.outputs, *new))

    def _wants(self, tap: Tap) -> bool:
        return self.only is None or any(fnmatch.fnmatchcase(str(tap), p) for p in self.only)


@dataclass
class _Calls:
    """The calls counted so far, by path and port, and the modules that run in loops."""

    made: Counter[tuple[str, str]] = field(default_factory=Counter)
    in_loops: set[tuple[str, str]] = field(default_factory=set)

    def next(self, path: str, port: str) -> Tap:
        tap = Tap(path, port, self.made[path, port])
        self.made[path, port] += 1
        return tap


def _hoist(
    gm: fx.GraphModule, effects: Effects, calls: _Calls, wants: Any, level: int = 0
) -> dict[Tap, fx.Node]:
    """Erase the markers of ``gm`` in order, and return the tapped values as nodes of ``gm``.

    ``level`` is the number of transforms (``torch.vmap``, ``torch.func``) around ``gm``.
    """
    found: dict[Tap, fx.Node] = {}
    for node in list(gm.graph.nodes):
        level += steps_of(node)
        if node.op == "call_function" and node.target is CHECKPOINT:
            body = getattr(gm, node.args[0].target)
            inner = _hoist(body, effects, calls, wants, level)
            found.update(_thread_out(gm, node, body, inner))
        elif isinstance(node.target, HigherOrderOperator):
            calls.in_loops |= _erase_within(gm, node)
        elif is_tap(node):
            value, _, path, port = node.args
            tap = calls.next(path, port)
            if level == 0 and wants(tap):
                source = value.args[0] if LOCAL in value.meta else value
                found[tap] = _at_return(gm.graph, node, source, effects)
            node.replace_all_uses_with(value)
            gm.graph.erase_node(node)
    return {tap: node for tap, node in found.items() if (tap.path, tap.port) not in calls.in_loops}


def _erase_within(gm: fx.GraphModule, loop: fx.Node) -> set[tuple[str, str]]:
    """Erase the markers in a loop or a branch, and return their paths and ports."""
    found = set()
    for given in loop.all_input_nodes:
        body = getattr(gm, str(given.target), None) if given.op == "get_attr" else None
        for node in all_nodes(body) if isinstance(body, fx.GraphModule) else []:
            if is_tap(node):
                value, _, path, port = node.args
                found.add((str(path), str(port)))
                node.replace_all_uses_with(cast(fx.Node, value))
                node.graph.erase_node(node)
    return found


def _at_return(graph: fx.Graph, marker: fx.Node, value: fx.Node, effects: Effects) -> fx.Node:
    """The value as it was when its module returned: a clone, if it may be written later."""
    if not (effects.written_after(value, marker) or effects.aliases_input(value)):
        return value
    with graph.inserting_after(marker):
        clone = graph.call_function(torch.clone, (value,))
    clone.meta = dict(marker.meta)
    return clone


def _thread_out(
    gm: fx.GraphModule, region: fx.Node, body: fx.GraphModule, inner: dict[Tap, fx.Node]
) -> dict[Tap, fx.Node]:
    """Make ``inner`` values outputs of a region, and read them behind it."""
    if not inner:
        return {}
    old = output_values(body.graph)
    out = body.graph.output_node()
    out.args = ((*old, *inner.values()),)
    body.recompile()
    examples = tuple(node.meta.get("example_value") for node in inner.values())
    region.meta["example_value"] = (*region.meta.get("example_value", ()), *examples)
    found, last = {}, region
    for i, (tap, node) in enumerate(inner.items()):
        with gm.graph.inserting_after(last):
            last = gm.graph.call_function(operator.getitem, (region, len(old) + i))
        last.meta = {k: v for k, v in node.meta.items() if k != "custom"}
        found[tap] = last
    return found
