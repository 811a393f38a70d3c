"""Sum over ranks early what large values wait for: the denominators of terms."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from fxdistill.graph.collectives import is_collective, reduces_a_number
from fxdistill.graph.program import Level, P, fork_module
from fxdistill.graph.sections import OBJECTIVE, section_of
from fxdistill.graph.traced import broad, forward_of, pins_order, writes


@dataclass(frozen=True)
class SumEarly:
    """Sum denominators over ranks as soon as their inputs are there, so that they can be packed.

    A term that forms its gradient in the forward needs Σ w over all ranks first. As ordered, this
    sum stands between the gradients of the term before and its own, and what gradients wait for is
    not packed with a later sum: each term would take a collective. The weights of tokens come from
    the batch, so that all these sums can come first.

    1. Candidates are all-reduces of 0-d tensors in the forward that values with dimensions wait
       for. Sums that are only returned stay, to be packed behind the last of them.
    2. A candidate moves, with the operators of the objective that it is computed from, behind the
       last operator of a model that these read, or to the front if they read none. It stays where
       one of them has an effect, or where that place is behind it.
    3. Nothing moves across a write. Where a node goes follows from its dependencies alone, so that
       all ranks keep one order of collectives.
    """

    level: ClassVar[Level] = "joint"

    def __call__(self, program: P) -> P:
        """Move the sums; a program in which none moves is returned as it is."""
        if not _waited_for(program.gm.graph):
            return program
        gm = fork_module(program.gm)
        nodes = list(gm.graph.nodes)
        order = _order(nodes, _waited_for(gm.graph))
        if order == nodes:
            return program
        end = gm.graph.output_node()
        for node in order:
            if node is not end:
                end.prepend(node)
        return replace(program, gm=gm)


def _waited_for(graph: fx.Graph) -> list[fx.Node]:
    """The sums over ranks of single numbers that values with dimensions of the forward wait for."""
    wide, waited = broad(graph.nodes), set[fx.Node]()
    forward = forward_of(graph)
    for node in reversed(forward):
        if any(user in forward and (user in wide or user in waited) for user in node.users):
            waited.add(node)
    return [node for node in forward if node in waited and reduces_a_number(node)]


def _order(nodes: list[fx.Node], sums: list[fx.Node]) -> list[fx.Node]:
    """``nodes``, with each of ``sums`` and what leads there as early as possible."""
    place = {node: i for i, node in enumerate(nodes)}
    first = max((place[node] for node in nodes if node.op == "placeholder"), default=-1)
    written = [place[node] for node in nodes if writes(node)]
    at = dict(place)
    for node in sums:
        leading, read = _leading(node)
        if all(map(_is_free, leading)):
            before = (i for i in written if i < place[node])
            target = max((first, *(place[source] for source in read), *before))
            at.update({other: min(at[other], target) for other in leading})
    return sorted(nodes, key=lambda node: (at[node], at[node] != place[node], place[node]))


def _leading(node: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
    """``node`` and the operators of the objective that it is computed from, and what these read."""
    inside, read = set[fx.Node](), set[fx.Node]()
    todo = [node]
    while todo:
        node = todo.pop()
        if node.op == "call_function" and section_of(node) in (None, OBJECTIVE):
            if node not in inside:
                inside.add(node)
                todo += node.all_input_nodes
        else:
            read.add(node)
    return inside, read


def _is_free(node: fx.Node) -> bool:
    """Whether ``node`` may move: it has no effect, and is no collective of larger values."""
    if pins_order(node):
        return False
    return not is_collective(node) or reduces_a_number(node)
