"""The collectives of a graph, and the bytes that they move.

This file does not import torch.distributed: it recognises operators by their names.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from fxdistill.graph.sections import section_of

_PREFIX = "_c10d_functional."
REDUCE = f"{_PREFIX}all_reduce.default"
WAIT = f"{_PREFIX}wait_tensor.default"


class Traffic(NamedTuple):
    """How often a collective runs, and the bytes that it returns on one rank."""

    times: int
    bytes: int


def collectives(graph: fx.Graph) -> dict[tuple[str | None, str], Traffic]:
    """Traffic by section (teacher, student, objective) and collective."""
    counts: Counter[tuple[str | None, str]] = Counter()
    sizes: Counter[tuple[str | None, str]] = Counter()
    for node in graph.nodes:
        if not is_collective(node):
            continue
        name = str(node.target).removeprefix(_PREFIX).split(".")[0]
        # A node that autograd adds after the last operator has no section: take that of its input.
        key = section_of(node) or next(map(section_of, node.all_input_nodes), None), name
        counts[key] += 1
        values = [v for v in tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
        sizes[key] += sum(int(v.numel()) * v.element_size() for v in values)
    return {key: Traffic(count, sizes[key]) for key, count in counts.items()}


def sum_of(
    found: Mapping[tuple[str | None, str], Traffic], wanted: Callable[[str | None], bool]
) -> dict[str, Traffic]:
    """Traffic by collective, summed over the sections that are wanted."""
    total: dict[str, Traffic] = {}
    for (section, name), (count, size) in found.items():
        if wanted(section):
            before = total.get(name, Traffic(0, 0))
            total[name] = Traffic(before.times + count, before.bytes + size)
    return total


def is_collective(node: fx.Node) -> bool:
    """Whether ``node`` is a collective, rather than the wait for one."""
    name = str(node.target)
    return node.op == "call_function" and name.startswith(_PREFIX) and name != WAIT


def reduces_a_number(node: fx.Node) -> bool:
    """Whether ``node`` is an all-reduce of a 0-d tensor that is followed directly by its waits."""
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
