"""Which values of a graph are written to memory, with operators run one by one or fused.

Run one by one, every operator writes its value. Inductor writes the inputs and outputs of matrix
products, reductions and other operators with code of their own, the outputs of the graph, and
little else: it computes an elementwise operator where its value is read. This file predicts that
from the kinds of operators alone, before anything is compiled.
"""

import itertools
import operator
from dataclasses import dataclass

import torch
from torch import fx

WINDOW = 16  # kernels: only loops less than this far apart are joined
READS = 4  # an elementwise value made of more values than this is written if it is read twice


@dataclass(frozen=True)
class Kernel:
    """Operators that run as one: the values that the kernel reads and writes.

    ``in_place``: the kernel may overwrite a value that it is the last to read.
    """

    node: fx.Node
    reads: tuple[fx.Node, ...]
    writes: tuple[fx.Node, ...]
    in_place: bool


def kernels_of(graph: fx.Graph, fuses: bool) -> list[Kernel]:
    """The kernels of ``graph`` in order."""
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    if not fuses:
        return [Kernel(n, tuple(n.all_input_nodes), (n,), False) for n in nodes]
    return _fused(nodes)


def _fused(nodes: list[fx.Node]) -> list[Kernel]:
    # For each value that is not written: the written values that it is computed from.
    sources: dict[fx.Node, tuple[fx.Node, ...]] = {}
    kernels = []
    for node in nodes:
        reads = dict.fromkeys(s for n in node.all_input_nodes for s in sources.get(n, (n,)))
        if _is_written(node, len(reads)):
            kernels.append(Kernel(node, tuple(reads), (node,), is_elementwise(node)))
        else:
            sources[node] = tuple(reads)
    return _joined(_merged(kernels))


def _merged(kernels: list[Kernel]) -> list[Kernel]:
    """Merge consecutive loops into one kernel: its inputs stay until all outputs are written.

    A value that only the kernel itself reads is not written.
    """
    last = {node: i for i, kernel in enumerate(kernels) for node in kernel.reads}
    found: list[Kernel] = []
    for loops, run in itertools.groupby(enumerate(kernels), lambda item: _is_loop(item[1])):
        members = list(run)
        if not loops:
            found += [kernel for _, kernel in members]
            continue
        end, _ = members[-1]
        made = dict.fromkeys(kernel.node for _, kernel in members)
        reads = dict.fromkeys(n for _, k in members for n in k.reads if n not in made)
        writes = tuple(n for n in made if last.get(n, -1) > end or _is_returned(n))
        # As seen in Inductor's code: no loop overwrites a value that several loops read.
        in_place = len(writes) == 1 and all(kernel.in_place for _, kernel in members)
        named = writes[-1] if writes else members[-1][1].node
        found.append(Kernel(named, tuple(reads), writes, in_place))
    return found


def _joined(kernels: list[Kernel]) -> list[Kernel]:
    """Join loops over the same values into one kernel, if nothing between must come first.

    The kernel runs in the place of the later loop; kernels that need values of the earlier one move
    after it.
    """
    order, at = list(kernels), 0
    while at < len(order):
        kernel = order[at]
        for first in range(at - 1, max(-1, at - WINDOW), -1) if _is_loop(kernel) else ():
            earlier, between = order[first], order[first + 1 : at]
            if not _is_loop(earlier) or not _shares(earlier, kernel):
                continue
            behind = _dependent(earlier, between)
            if any(n in other.writes for other in behind for n in kernel.reads):
                continue
            before = [other for other in between if other not in behind]
            order[first : at + 1] = [*before, _one(earlier, kernel), *behind]
            at = first + len(before)
            break
        at += 1
    return order


def _one(first: Kernel, second: Kernel) -> Kernel:
    reads = dict.fromkeys(n for n in (*first.reads, *second.reads) if n not in first.writes)
    return Kernel(second.node, tuple(reads), (*first.writes, *second.writes), False)


def _shares(a: Kernel, b: Kernel) -> bool:
    """Whether both read one value that is as large as any that they write."""
    if not a.writes or not b.writes:
        return False
    largest = max(map(_count, (*a.writes, *b.writes)))
    return largest > 1 and any(_count(n) >= largest for n in a.reads if n in b.reads)


def _count(node: fx.Node) -> int:
    value = node.meta.get("val")
    return int(value.numel()) if isinstance(value, torch.Tensor) else 0


def _dependent(kernel: Kernel, later: list[Kernel]) -> list[Kernel]:
    """The kernels of ``later`` that read what ``kernel`` writes, directly or through others."""
    made, found = set(kernel.writes), []
    for other in later:
        if made.intersection(other.reads):
            found.append(other)
            made.update(other.writes)
    return found


def _is_loop(kernel: Kernel) -> bool:
    return is_elementwise(kernel.node) or is_reduction(kernel.node)


def _is_returned(node: fx.Node) -> bool:
    return any(u.op == "output" or (is_view(u) and _is_returned(u)) for u in node.users)


def _is_written(node: fx.Node, reads: int) -> bool:
    if is_view(node):
        return any(user.op == "output" for user in node.users)
    if not is_elementwise(node):
        return True
    return _is_needed(node) or (len(node.users) > 1 and reads > READS)


def _is_needed(node: fx.Node) -> bool:
    """Whether ``node`` or a view of it is returned, or read by an operator that is not fused."""
    for user in node.users:
        if user.op == "output" or not (is_elementwise(user) or is_reduction(user) or is_view(user)):
            return True
        if is_view(user) and _is_needed(user):
            return True
    return False


def is_view(node: fx.Node) -> bool:
    """Whether ``node`` is a view of its input."""
    if node.target in (torch.ops.aten._unsafe_view.default, operator.getitem):
        return True
    return bool(getattr(node.target, "is_view", False))


_REDUCTIONS = {
    *("sum", "mean", "amax", "amin", "argmax", "argmin", "prod", "any", "all"),
    *("var", "var_mean", "std", "logsumexp", "norm"),
}
_CODE_OF_ITS_OWN = {
    *("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"),
    *("sort", "topk", "index_put", "_fft_r2c"),
}


def is_reduction(node: fx.Node) -> bool:
    """Whether ``node`` reduces a large value to a small one."""
    return _name(node) in _REDUCTIONS


def is_elementwise(node: fx.Node) -> bool:
    """Whether Inductor computes ``node`` where it is read."""
    name = _name(node)
    if name in _REDUCTIONS or name in _CODE_OF_ITS_OWN or not name:
        return False
    return not name.startswith(("_scaled_dot_product", "max_pool", "_cudnn", "cumsum"))


def _name(node: fx.Node) -> str:
    """The name of an operator of torch; ``""`` for any other target."""
    packet = getattr(node.target, "overloadpacket", None)
    namespace, _, name = str(packet or "").partition(".")
    return name if namespace in ("aten", "prims") else ""
