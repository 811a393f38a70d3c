"""A program as text: one line for each call of a module or a loss, with the value it returns."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._pytree import tree_leaves

from fxdistill.base.figures import operations, size
from fxdistill.base.tensors import is_placed
from fxdistill.graph.captured_flops import Costs
from fxdistill.graph.program import Program
from fxdistill.graph.sections import ITSELF, module_of, section_of
from fxdistill.losses.formed import formed
from fxdistill.models.tap import Section


@dataclass(frozen=True)
class Line:
    """The value and the cost of one module, or of one function outside of modules."""

    section: Section
    name: str
    kind: str
    value: str
    flops: int | None
    bytes: int


def listing(program: Program) -> str:
    """The program, a line for each call: path, class, value, FLOPs, bytes of the value."""
    found = list(lines(program))
    names = max((len(line.name) for line in found), default=0)
    kinds = max((len(line.kind) for line in found), default=0)
    values = max((len(line.value) for line in found), default=0)
    text = [f"{program.title or program.level} -> {', '.join(program.outputs)}"]
    for section, members in itertools.groupby(found, lambda line: line.section):
        text.append(section)
        for line in members:
            flops = "?" if line.flops is None else operations(line.flops) if line.flops else ""
            parts = f"  {line.name:<{names}}  {line.kind:<{kinds}}  {line.value:<{values}}"
            held = size(line.bytes) if line.bytes else ""
            text.append(f"{parts}  {flops:>11}  {held:>9}".rstrip())
    return "\n".join(text)


def lines(program: Program) -> Iterator[Line]:
    """Yield one line for consecutive nodes of one module."""
    costs = Costs()
    gm = program.gm
    for (section, path, kind), run in itertools.groupby(_calls(gm), lambda call: _key(call[0])):
        calls = list(run)
        members = [node for node, _ in calls]
        flops = [costs.flops(node, holder) for node, holder in calls]
        shown = next((n for n in reversed(members) if _tensors(n)), members[-1])
        # Outside of modules, skip glue (sizes, masks, weights of terms), not a model's products.
        own = section != "objective" and any(count != 0 for count in flops)
        if not _tensors(shown) or not (path or own):
            continue
        yield Line(
            section,
            path or ITSELF,
            kind,
            ", ".join(map(_value, _tensors(shown)[:2])),
            None if None in flops else sum(n for n in flops if n is not None),
            sum(map(_bytes, _tensors(shown))),
        )


def _calls(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.GraphModule]]:
    """The calls of a graph, each with the graph that holds it; a term's stand in their place."""
    for node in gm.graph.nodes:
        if node.target is formed:
            yield from _calls(getattr(gm, str(node.all_input_nodes[0].target)))
        elif node.op in ("call_function", "call_method"):
            yield node, gm


def _key(node: fx.Node) -> tuple[str, str, str]:
    section = section_of(node) or ""
    tower, path = module_of(node)
    stack = node.meta.get("nn_module_stack")
    if path and stack:
        kind = next(reversed(stack.values()))[1]
        path = f"{tower}.{path}" if tower == "projections" else path
        return section, path, getattr(kind, "__name__", str(kind).rpartition(".")[2])
    module = getattr(node.target, "__module__", None) or "torch"
    if section == "objective" and not module.startswith(("torch", "_operator", "builtins")):
        return section, node.name, getattr(node.target, "__name__", str(node.target))
    return section, "", ""


def _tensors(node: fx.Node) -> list[Tensor]:
    value: Any = node.meta.get("example_value", node.meta.get("val"))
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def _value(x: Tensor) -> str:
    placed = f" {', '.join(map(str, x.placements))}" if is_placed(x) else ""
    kind = str(x.dtype).removeprefix("torch.")
    return f"{kind}[{', '.join(map(_size, x.shape))}]{placed}"


def _size(size: int | torch.SymInt) -> str:
    """A size as text; ``?`` if it depends on values."""
    try:
        return str(int(size))
    except GuardOnDataDependentSymNode:
        return "?"


def _bytes(x: Tensor) -> int:
    """The bytes of a value; 0 if they depend on values."""
    try:
        return int(x.numel()) * x.element_size()
    except GuardOnDataDependentSymNode:
        return 0
