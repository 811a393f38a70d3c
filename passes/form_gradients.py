"""Form the gradients of feature terms in the forward, so that they keep nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator
from torch.utils._pytree import tree_leaves

from fxdistill.base.ranks import over_ranks, samples_of_all, shared
from fxdistill.base.tensors import is_placed
from fxdistill.base.transforms import is_of_functorch
from fxdistill.graph.effects import effects_of
from fxdistill.graph.program import Level, P, fork_module, graph_module, output_values
from fxdistill.graph.sections import OBJECTIVE, SECTION, section_of
from fxdistill.losses.formed import formed

FORMED = "fxdistill_formed"  # in meta["custom"]: the operators of a term that forms its gradient


@dataclass(frozen=True)
class FormGradients:
    """Put each feature term into a part that forms its gradient at once.

    1. The part holds what lies between the values that learn (of the student, and the parameters of
       a projection) and the term's value; weights and the teacher's values are its constants.
    2. A term stays as it is if one of its intermediate values is read elsewhere, if a value that it
       holds or reads is written by the objective, or if it holds a region (a checkpoint, a loop),
       a transform (``torch.vmap``), or a change of autocast or of grad mode.
    3. So does a term with float16 values: their gradients would be formed before a GradScaler has
       scaled them, and be rounded to 0.
    4. So does a term that compares the samples of all ranks: it gathers them. Other terms on ranks
       need no further collective for their gradients. What a term is divided by is a constant here.
       Parameters enter as they are on all ranks (``base.ranks.shared``, or as DTensors), so that
       their gradients are summed in the backward.

    ``terms`` are the names of feature terms among the program's outputs.
    """

    terms: tuple[str, ...] = ()
    level: ClassVar[Level] = "captured"

    def __call__(self, program: P) -> P:
        """Form what can be formed; a program without such terms is returned as it is."""
        if not any(name in self.terms for name in program.outputs):
            return program
        gm = fork_module(program.gm)
        written = _written(gm)
        left, count = dict[str, list[str]](), 0
        for name, output in zip(program.outputs, output_values(gm.graph), strict=True):
            if name in self.terms and isinstance(output, fx.Node):
                part = _part_of(_value_of(output), written)
                if isinstance(part, str):
                    left.setdefault(part, []).append(name)
                else:
                    _replace(gm, name, part)
                    count += 1
        why = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in left.items())
        if not count:
            said = f"no term keeps its gradients alone: {why}"
            return replace(program, remarks=(*program.remarks, said)) if left else program
        gm.graph.lint()
        gm.recompile()
        remark = f"{count} terms keep their gradients alone"
        if left:
            remark += f"; as they were: {why}"
        return replace(program, gm=gm, remarks=(*program.remarks, remark))


@dataclass(frozen=True)
class _Part:
    """The nodes of a term in order, the last of which is its value, and what they read."""

    nodes: tuple[fx.Node, ...]
    learnt: tuple[fx.Node, ...]
    constants: tuple[fx.Node, ...]


def _value_of(output: fx.Node) -> fx.Node:
    """The value of a term: the step returns it without its gradient, summed over ranks."""
    if output.target is over_ranks and isinstance(output.args[0], fx.Node):
        output = output.args[0]
    detached = output.target == "detach" or getattr(output.target, "__name__", "") == "detach"
    first = output.args[0] if detached and output.args else output
    return first if isinstance(first, fx.Node) else output


def _written(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes of the objective that write, and all whose storage these write."""
    effects = effects_of(gm)
    writers = {n: own for n, own in effects.writes.items() if section_of(n) in (None, OBJECTIVE)}
    storages = frozenset[int]().union(*writers.values())
    return {n for n, own in effects.storages.items() if own & storages} | set(writers)


def _learns(node: fx.Node) -> bool:
    """Whether a node's value, or a part of it, has a gradient."""
    leaves = tree_leaves(node.meta.get("example_value"))
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)


def _part_of(value: fx.Node, written: set[fx.Node]) -> _Part | str:
    """The part of a graph that computes ``value``, or why it cannot stand for itself."""
    if section_of(value) not in (None, OBJECTIVE) or not _learns(value):
        return "no gradient"
    if any(map(is_of_functorch, _computed_from(value))):
        return "a transform"  # inside of one, values do not say that they have a gradient
    inside: set[fx.Node] = set()
    todo = [value]
    while todo:
        node = todo.pop()
        if node not in inside and _is_ours(node) and _learns(node) and not _spreads(node):
            inside.add(node)
            todo += node.all_input_nodes
    ordered = tuple(node for node in value.graph.nodes if node in inside)
    read = dict.fromkeys(n for node in ordered for n in node.all_input_nodes if n not in inside)
    if why := _unfit(ordered, tuple(read), written):
        return why
    learnt = tuple(node for node in read if _learns(node))
    return _Part(ordered, learnt, tuple(node for node in read if node not in learnt))


def _unfit(ordered: Sequence[fx.Node], read: Sequence[fx.Node], written: set[fx.Node]) -> str:
    """Why the nodes of a term, which read others, cannot form their gradient; or nothing."""
    inside, learnt = set(ordered), [node for node in read if _learns(node)]
    if any(node.target is samples_of_all for node in ordered):
        return "samples of all ranks"
    if any(isinstance(node.target, HigherOrderOperator) for node in ordered):
        return "a region"
    if any(map(_is_half, (*ordered, *learnt))):
        return "float16"
    if any(user not in inside for node in ordered[:-1] for user in node.users):
        return "values that are read elsewhere"
    if any(node in written for node in (*read, *ordered)):
        return "values that are written"
    if _changes_state(ordered):
        return "autocast or grad mode of its own"
    if not all(isinstance(node.meta["example_value"], Tensor) for node in learnt) or not learnt:
        return "inputs that are no tensors"
    if any("example_value" not in node.meta and node.op != "get_attr" for node in read):
        return "inputs of which nothing is known"  # they may have a gradient
    return ""


def _spreads(node: fx.Node) -> bool:
    """Whether ``node`` is a parameter on all ranks, the backward of which sums their gradients."""
    if node.target is shared:
        return True
    if not _is_ours(node) or not is_placed(node.meta.get("example_value")):
        return False
    learnt = [source for source in node.all_input_nodes if _learns(source)]
    return all(_spreads(source) or _is_plain_input(source) for source in learnt)


def _is_plain_input(node: fx.Node) -> bool:
    is_input = node.op in ("placeholder", "get_attr")
    return is_input and not is_placed(node.meta.get("example_value"))


def _computed_from(value: fx.Node) -> set[fx.Node]:
    """All operators of the objective that ``value`` depends on, with a gradient or without."""
    found: set[fx.Node] = set()
    todo = [value]
    while todo:
        node = todo.pop()
        if _is_ours(node) and node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def _is_ours(node: fx.Node) -> bool:
    called = node.op in ("call_function", "call_method")
    return called and section_of(node) in (None, OBJECTIVE)


def _is_half(node: fx.Node) -> bool:
    leaves = tree_leaves(node.meta.get("example_value"))
    return any(isinstance(leaf, Tensor) and leaf.dtype == torch.float16 for leaf in leaves)


def _changes_state(ordered: Sequence[fx.Node]) -> bool:
    """Whether a node from the first to the last changes autocast, grad mode or the like.

    Such a node has no value, and is called for its effect; one that enters autocast returns what
    the one that leaves it takes.
    """
    node = ordered[0]
    while node is not ordered[-1]:
        called = node.op == "call_function"
        if called and ("example_value" not in node.meta or "autocast" in str(node.target)):
            return True
        node = node.next
    return False


def _replace(gm: fx.GraphModule, name: str, part: _Part) -> None:
    """Put a call of the part, as a module of its own, in the place of its nodes."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in (*part.learnt, *part.constants):
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    for node in part.nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
        env[node].meta = _labelled(node, name)
    graph.output(env[part.nodes[-1]])
    attribute = f"formed_{sum(node.target is formed for node in gm.graph.nodes)}"
    gm.add_submodule(attribute, graph_module(gm, graph, "Term"))
    last = part.nodes[-1]
    with gm.graph.inserting_before(last):
        inner = gm.graph.get_attr(attribute)
        given: tuple[Any, ...] = (inner, len(part.learnt), *part.learnt, *part.constants)
        call = gm.graph.call_function(formed, given)
    inner.meta = call.meta = _labelled(last, name)
    last.replace_all_uses_with(call)
    for node in reversed(part.nodes):
        gm.graph.erase_node(node)


def _labelled(node: fx.Node, name: str) -> dict[str, Any]:
    custom = {**node.meta.get("custom", {}), SECTION: OBJECTIVE, FORMED: name}
    return {**node.meta, "custom": custom}
