"""Compute a feature term as soon as both of its values are there."""

from collections.abc import Container
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from fxdistill.graph.collectives import reduces_a_number
from fxdistill.graph.program import Level, P, fork_module
from fxdistill.graph.sections import OBJECTIVE, section_of
from fxdistill.graph.traced import forward_of, writes
from fxdistill.models.tap import Tower
from fxdistill.passes.form_gradients import FORMED


@dataclass(frozen=True)
class MeetEarly:
    """Order the forward by the student, and form each term behind the layer that it teaches.

    As traced, the teacher runs first and all terms come last, so that all matched values of both
    models live together. The graph of this level is functional, and any order that computes a value
    before its readers is right. The main model keeps its order. Behind each of its operators follow
    the terms that now have all of it that they read, each behind what it needs of the teacher. So
    of the matched values of a teacher, few live at a time. The gradients that terms have formed are
    saved for the backward, and not computed a second time there.

    ``teachers`` names the frozen models. A graph whose terms form no gradients is returned as it
    is. So is the order, but not the marks, where a teacher draws random numbers.
    """

    teachers: tuple[Tower, ...] = ("teacher",)
    level: ClassVar[Level] = "joint"

    def __call__(self, program: P) -> P:
        """Reorder the forward, and mark the gradients."""
        if not any(_formed(node) for node in program.gm.graph.nodes):
            return program
        gm = fork_module(program.gm)
        forward = forward_of(gm.graph)
        for node in forward:
            if _formed(node) and any(user not in forward for user in node.users):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        if not any(section_of(node) in self.teachers and _is_random(node) for node in forward):
            self._order(gm.graph, forward)
        gm.graph.lint()
        gm.recompile()
        return replace(program, gm=gm)

    def _order(self, graph: fx.Graph, forward: dict[fx.Node, int]) -> None:
        late = (*self.teachers, OBJECTIVE)
        last = [n for n in forward if writes(n)]
        leading = [
            n
            for n in forward
            if n.op != "placeholder" and section_of(n) not in late and n not in last
        ]
        position = {node: i for i, node in enumerate(leading)}
        terms, due = _terms(forward), dict[int, list[str]]()
        for name, nodes in terms.items():
            needed = (position[n] for n in _ancestors(nodes, forward) if n in position)
            due.setdefault(max(needed, default=-1), []).append(name)
        order: dict[fx.Node, None] = {}

        def emit(nodes: list[fx.Node]) -> None:
            missing = _ancestors(nodes, forward, order)
            order.update(dict.fromkeys(sorted(missing, key=forward.__getitem__)))

        for i, node in enumerate((None, *leading), start=-1):
            if node is not None:
                emit([node])
            for name in due.get(i, ()):
                emit(terms[name])
        emit([n for n in forward if n not in last])
        emit(last)  # what is written into an input may be read by any model before
        _arrange(graph, order)


def _formed(node: fx.Node) -> str:
    custom = node.meta.get("custom") or {}
    return str(custom.get(FORMED, ""))


def _terms(forward: dict[fx.Node, int]) -> dict[str, list[fx.Node]]:
    """The operators of each term that forms its gradient, without a sum of its value over ranks.

    That sum, and what follows, comes behind all terms, where one collective sums all values.
    """
    found: dict[str, list[fx.Node]] = {}
    summed: set[fx.Node] = set()
    for node in forward:
        if name := _formed(node):
            if reduces_a_number(node) or not summed.isdisjoint(node.all_input_nodes):
                summed.add(node)
            else:
                found.setdefault(name, []).append(node)
    return found


def _ancestors(
    nodes: list[fx.Node], forward: dict[fx.Node, int], but: Container[fx.Node] = ()
) -> set[fx.Node]:
    """``nodes``, and all of the forward that they are computed from, ``but`` what is there."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found and node in forward and node not in but:
            found.add(node)
            todo += node.all_input_nodes
    return found


def _is_random(node: fx.Node) -> bool:
    """Whether an operator draws random numbers; attention without dropout only looks like it."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return bool(given.get("dropout_p", "dropout_p" not in names))


def _arrange(graph: fx.Graph, order: dict[fx.Node, None]) -> None:
    """Put the nodes of ``order`` before all others, in that order; placeholders stay in front."""
    moved = [node for node in order if node.op != "placeholder"]
    first = next(node for node in graph.nodes if node.op != "placeholder")
    previous = first.prev
    for node in moved:
        previous.append(node)
        previous = node
