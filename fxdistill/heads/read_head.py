"""Read logits backwards: hidden state → linear → scale, cap, slice, cast → logits.

The graph of a language model ends in a linear layer (whose weight may be tied to the embedding) and
at most a few operators on single logits. The result is a ``Head``, from which the fused form of
``losses.vocab`` computes the same logits chunk by chunk.
"""

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxdistill.base.tensors import is_placed
from fxdistill.heads.curve import Curve, Form, Unreadable, logits_from
from fxdistill.heads.operators import classify, require_lossless, split_index


@dataclass(frozen=True)
class Head:
    """How a graph computes logits. ``moves`` reshape and index their leading axes, in order."""

    hidden: fx.Node
    weight: fx.Node
    transposed: bool = False  # the weight is [D, V]
    form: Form = field(default_factory=Form)
    moves: tuple[Callable[[fx.Graph, fx.Node], fx.Node], ...] = ()
    detached: bool = False
    gathered: fx.Node | None = None  # the hidden state as its parallel style gathered it
    nodes: tuple[fx.Node, ...] = ()  # from the logits back to the linear layer

    @property
    def bias(self) -> fx.Node | None:
        """The bias of the linear layer."""
        found: fx.Node | None = self.form.bias
        return found

    @property
    def curve(self) -> Curve:
        """What the head does to each output of the linear layer."""
        return self.form.curve

    @property
    def logits(self) -> fx.Node:
        """The node of the logits, the last of the head."""
        return self.nodes[0]

    @property
    def linear(self) -> fx.Node:
        """The node of the linear layer."""
        return self.nodes[-1]

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The nodes that the linear layer reads."""
        return tuple(n for n in (self.hidden, self.weight, self.bias) if n is not None)

    def emit(self, graph: fx.Graph) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        """Write hidden state ``[..., D]``, weight ``[V, D]`` and bias ``[V]`` into ``graph``."""
        hidden, weight, bias = self.hidden, self.weight, self.bias
        for move in self.moves:
            hidden = move(graph, hidden)
        if self.transposed:
            weight = graph.call_method("t", (weight,))
        if bias is not None and len(value_of(bias).shape) > 1:
            bias = graph.call_method("reshape", (bias, -1))
        if self.form.columns is not None:
            rows = slice(None, self.form.columns, None)
            weight = graph.call_function(operator.getitem, (weight, rows))
            bias = bias and graph.call_function(operator.getitem, (bias, rows))
        return hidden, weight, bias


def value_of(node: fx.Node) -> Tensor:
    """The fake tensor of ``node``; raises Unreadable if the node is no tensor."""
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor):
        raise Unreadable(f"{node.name} is no tensor")
    return value


def read_head(logits: fx.Node, readers: Collection[fx.Node] = ()) -> Head:
    """Read the head backwards from its ``logits``; raises Unreadable for any other form.

    Besides the head, ``readers`` may read what it computes.
    """
    size = value_of(logits).shape[-1]
    if not isinstance(size, int):
        raise Unreadable("vocabulary has no fixed size")
    chain: list[fx.Node] = []
    node = logits
    while (found := _projection(node)) is None:
        chain.append(node)
        node = _source(node)
        _require_one_reader(node, readers)
    head = replace(found, nodes=(*chain, node))
    for step in reversed(chain):
        head = _followed(head, step)
    for source in (*head.inputs, logits):
        if is_traceable_wrapper_subclass(value_of(source)) and not is_placed(value_of(source)):
            raise Unreadable(f"head reads a {type(value_of(source)).__name__}, no plain tensor")
    if is_placed(value_of(head.weight)):
        return _on_mesh(head)
    return head


def _on_mesh(head: Head) -> Head:
    """A head of DTensors that reads the hidden state before its parallel style gathers it."""
    if head.moves or head.form.columns is not None:
        raise Unreadable("logits are sharded, and cut or laid out anew")
    hidden = head.hidden
    if hidden.target == "redistribute" and isinstance(hidden.args[0], fx.Node):
        return replace(head, hidden=hidden.args[0], gathered=hidden)
    return head


_LINEAR = (torch.nn.functional.linear, torch._C._nn.linear)
_MATMUL = (torch.matmul, operator.matmul, "matmul")


def _projection(node: fx.Node) -> Head | None:
    """The head that consists of the linear layer ``node``; ``None`` for any other node."""
    if node.target is logits_from:
        hidden, weight, bias, spec = node.args
        return Head(hidden, weight, form=Form.read(str(spec), bias))  # type: ignore[arg-type]
    if node.target in _LINEAR:
        hidden, weight, bias = (*node.args, None)[:3] if len(node.args) > 1 else (None,) * 3
        bias = node.kwargs.get("bias", bias)
        if isinstance(hidden, fx.Node) and isinstance(weight, fx.Node):
            return Head(hidden, weight, form=Form(bias=bias if isinstance(bias, fx.Node) else None))
    if node.target in _MATMUL and len(node.args) == 2:
        hidden, weight = node.args
        if isinstance(hidden, fx.Node) and isinstance(weight, fx.Node):
            if value_of(weight).ndim != 2:
                raise Unreadable("logits are a product of two activations")
            return Head(hidden, weight, transposed=True)
    return None


def _source(node: fx.Node) -> fx.Node:
    """The input of ``node`` that carries the logits; raises Unreadable for an unknown operator."""
    if node.op in ("call_function", "call_method") and classify(node.target) is not None:
        tensors = [n for n in node.args[:2] if isinstance(n, fx.Node)]
        tensors = [n for n in tensors if isinstance(n.meta.get("example_value"), Tensor)]
        if len(tensors) == 2:  # the larger one carries the tokens
            tensors.sort(key=lambda n: -value_of(n).ndim)
            a, b = (value_of(n) for n in tensors)
            if a.ndim == b.ndim and b.shape[:-1] != (1,) * (b.ndim - 1):
                tensors.reverse()
        if tensors:
            return tensors[0]
    raise Unreadable(f"logits come from {target_name(node)}, not from a linear layer")


def _require_one_reader(node: fx.Node, readers: Collection[fx.Node]) -> None:
    if len([user for user in node.users if user not in readers]) > 1:
        names = ", ".join(target_name(user) for user in node.users)
        raise Unreadable(f"logits are read on their way by {names}")


def _followed(head: Head, step: fx.Node) -> Head:
    """``head``, followed by the operator ``step``."""
    kind, source, form = classify(step.target), _source(step), head.form
    if kind in ("times", "divided"):
        if kind == "divided" and step.args[0] is not source:
            raise Unreadable("logits are what something is divided by")
        number = _other(step, source)
        return replace(head, form=form.scaled(number, target_name(step), divided=kind == "divided"))
    if kind == "tanh":
        return replace(head, form=form.bent())
    if kind == "plus":
        return _with_bias(head, step, source)
    if kind == "reshaped":
        return _reshaped(head, step, source)
    if kind == "sliced":
        return _sliced(head, step, source)
    if kind == "rolled":
        return _rolled(head, step)
    if kind == "cast":
        before, after = value_of(source), value_of(step)
        require_lossless(before.dtype, after.dtype)
        if after.device != before.device:
            raise Unreadable(f"logits are moved from {before.device} to {after.device}")
    return replace(head, detached=True) if kind == "detached" else head


def _other(step: fx.Node, source: fx.Node) -> Any:
    """The other operand of ``step``; ``None`` if there is none or more than one."""
    others = [value for value in (*step.args, *step.kwargs.values()) if value is not source]
    return others[0] if len(others) == 1 else None


def _with_bias(head: Head, step: fx.Node, source: fx.Node) -> Head:
    bias, name = _other(step, source), target_name(step)
    if not isinstance(bias, fx.Node) or step.kwargs:
        raise Unreadable(f"logits come from {name}, not from a linear layer")
    form = head.form.with_bias(bias, value_of(bias), value_of(source), name)
    return replace(head, form=form)


def _reshaped(head: Head, step: fx.Node, source: fx.Node) -> Head:
    """Reshape the leading axes of the hidden state as ``step`` reshapes those of the logits."""
    before, after = value_of(source), value_of(step)
    if len(step.args) < 2:
        raise Unreadable(f"logits pass through {target_name(step)} by keyword")
    sizes = step.args[1] if isinstance(step.args[1], (tuple, list)) else step.args[1:]
    if before.shape[-1] != after.shape[-1] or step.kwargs:
        raise Unreadable(f"logits pass through {target_name(step)}, across the vocabulary")
    leading, width = tuple(sizes)[:-1], value_of(head.hidden).shape[-1]

    def move(graph: fx.Graph, hidden: fx.Node) -> fx.Node:
        return graph.call_method("reshape", (hidden, *leading, width))

    return replace(head, moves=(*head.moves, move))


def _sliced(head: Head, step: fx.Node, source: fx.Node) -> Head:
    """Apply an index to the head: tokens index the hidden state, columns cut the weight."""
    value = value_of(source)
    index, columns = split_index(step.args[1], value.ndim, value.shape[-1])
    head = replace(head, form=head.form.cut(columns, value.shape[-1]))
    if not index:
        return head

    def move(graph: fx.Graph, hidden: fx.Node) -> fx.Node:
        return graph.call_function(operator.getitem, (hidden, index))

    return replace(head, moves=(*head.moves, move))


def _rolled(head: Head, step: fx.Node) -> Head:
    """Roll the tokens of the hidden state as ``step`` rolls those of the logits."""
    _, count, axis = step.args if len(step.args) == 3 else (None, None, None)
    if axis != 1 or step.kwargs:
        raise Unreadable("logits are rolled along another axis than the tokens'")

    def move(graph: fx.Graph, hidden: fx.Node) -> fx.Node:
        return graph.call_function(torch.roll, (hidden, count, 1))

    return replace(head, moves=(*head.moves, move))


def is_cut(node: fx.Node, source: fx.Node) -> bool:
    """Whether ``node`` takes the first columns of ``source``, for all of its tokens."""
    if node.target is not operator.getitem or node.args[0] is not source:
        return False
    try:
        head = _sliced(Head(source, source), node, source)
    except Unreadable:
        return False
    return not head.moves


def target_name(node: fx.Node) -> str:
    """The name of a node's operator, for messages."""
    if node.op == "output":
        return "the output"
    if node.op == "placeholder":
        return "the model, which makes them"
    return str(getattr(node.target, "__name__", node.target))
