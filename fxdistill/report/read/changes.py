"""What each pass changed, in numbers: nodes, FLOPs and bytes before and after."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    free_unbacked_symbols,
)
from torch.utils._pytree import tree_leaves

from fxdistill.graph.captured_flops import Costs
from fxdistill.graph.flops import flops_of
from fxdistill.graph.program import PassRecord
from fxdistill.report.data import Change, PassLine


def pass_lines(history: Iterable[PassRecord]) -> tuple[PassLine, ...]:
    """One line for each pass record."""
    costs = Costs()
    return tuple(_line(record, costs) for record in history)


def _line(record: PassRecord, costs: Costs) -> PassLine:
    captured = record.level == "captured"
    both = (record.before, record.after)
    flops = [_or_unknown(_flops, gm, costs if captured else None) for gm in both]
    sizes = [_or_unknown(_bytes, gm) for gm in both]
    return PassLine(
        record.name,
        record.graph,
        record.level,
        record.changed,
        Change(record.nodes_before, record.nodes_after),
        _change(flops),
        _change(sizes),
        record.added,
        record.remarks,
        record.seconds,
    )


def _or_unknown(count: Callable[..., int | None], *args: Any) -> int | None:
    try:
        return count(*args)
    except GuardOnDataDependentSymNode:
        return None


def depends_on_values(graph: fx.Graph) -> str:
    """The first line of the user's code whose value has a size that is unknown until it runs."""
    for node in graph.nodes:
        if any(free_unbacked_symbols(x) for x in tree_leaves(node.meta.get("val"))):
            trace = str(node.meta.get("stack_trace") or "").rstrip()
            last = trace[trace.rfind("  File") :].splitlines()[:2] if "  File" in trace else []
            return "".join(f"\n{line}" for line in last)
    return ""


def _change(values: list[int | None]) -> Change | None:
    before, after = values
    return None if before is None or after is None else Change(before, after)


def _flops(gm: fx.GraphModule | None, costs: Costs | None) -> int | None:
    """The FLOPs of all nodes; ``None`` if those of one node are unknown."""
    if gm is None:
        return None
    if costs is None:
        return sum(map(flops_of, gm.graph.nodes))
    found = [costs.flops(node, gm) for node in gm.graph.nodes]
    return None if None in found else sum(n for n in found if n is not None)


def _bytes(gm: fx.GraphModule | None) -> int | None:
    if gm is None:
        return None
    return sum(bytes_of(n) for n in gm.graph.nodes if n.op not in ("placeholder", "output"))


def bytes_of(node: fx.Node) -> int:
    """The bytes of the tensors that ``node`` returns; a view counts with its own size."""
    value = node.meta.get("val", node.meta.get("example_value"))
    tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    return sum(int(x.numel()) * x.element_size() for x in tensors)
