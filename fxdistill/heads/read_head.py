"""Reading logits backwards: hidden state → linear → scale, cap, slice, cast → logits.

The graph of a language model ends in a linear layer (its weight tied to the embedding or not) and
at most a few operators on single logits. What is read here is a value, ``Head``, from which the
fused form of ``losses.vocab`` computes the same logits a chunk at a time.
"""

import ast
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxdistill.base.tensors import is_placed
from fxdistill.heads.curve import Curve, Unreadable, logits_from, split_index


@dataclass(frozen=True)
class Head:
    """Where logits come from. ``moves`` are what happens to their leading axes."""

    hidden: fx.Node
    weight: fx.Node
    transposed: bool = False  # the weight is [D, V]
    bias: fx.Node | None = None
    curve: Curve = field(default_factory=Curve)
    columns: int | None = None  # of the vocabulary, where not all are used
    moves: tuple[Callable[[fx.Graph, fx.Node], fx.Node], ...] = ()
    detached: bool = False
    gathered: fx.Node | None = None  # the hidden state as its parallel style gathered it
    nodes: tuple[fx.Node, ...] = ()  # from the logits back to the linear layer

    @property
    def logits(self) -> fx.Node:
        """What the head ends in."""
        return self.nodes[0]

    @property
    def linear(self) -> fx.Node:
        """The linear layer."""
        return self.nodes[-1]

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """What the linear layer reads."""
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
        if self.columns is not None:
            rows = slice(None, self.columns, None)
            weight = graph.call_function(operator.getitem, (weight, rows))
            bias = bias and graph.call_function(operator.getitem, (bias, rows))
        return hidden, weight, bias


def value_of(node: fx.Node) -> Tensor:
    """The fake tensor that stands for ``node``."""
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor):
        raise Unreadable(f"{node.name} is no tensor")
    return value


def read_head(logits: fx.Node) -> Head:
    """Read backwards from ``logits``; Unreadable says what stands in the way."""
    size = value_of(logits).shape[-1]
    if not isinstance(size, int):
        raise Unreadable("vocabulary has no fixed size")
    chain: list[fx.Node] = []
    node = logits
    while (found := _projection(node)) is None:
        chain.append(node)
        node = _source(node)
        _require_one_reader(node)
    head = replace(found, nodes=(*chain, node))
    for step in reversed(chain):
        head = _followed(head, step)
    for source in (*head.inputs, logits):
        if is_traceable_wrapper_subclass(value_of(source)) and not is_placed(value_of(source)):
            raise Unreadable(f"{source.name} is a {type(value_of(source)).__name__}")
    if is_placed(value_of(head.weight)):
        return _on_mesh(head)
    return head


def _on_mesh(head: Head) -> Head:
    """A head of DTensors: what its parallel style has gathered for it need not be."""
    if head.moves or head.columns is not None:
        raise Unreadable("logits are sharded, and cut or laid out anew")
    hidden = head.hidden
    if hidden.target == "redistribute" and isinstance(hidden.args[0], fx.Node):
        return replace(head, hidden=hidden.args[0], gathered=hidden)
    return head


_LINEAR = (torch.nn.functional.linear, torch._C._nn.linear)
_MATMUL = (torch.matmul, operator.matmul, "matmul")
_TIMES = (operator.mul, torch.mul, "mul")
_DIVIDED = (operator.truediv, torch.div, torch.true_divide, "div")
_PLUS = (operator.add, torch.add, "add")
_TANH = (torch.tanh, torch.nn.functional.tanh, "tanh")
_RESHAPED = (torch.reshape, "reshape", "view")
_CAST = ("float", "to", "type", "contiguous", "type_as")
_DETACHED = ("detach", torch.detach)
_PLACED = ("redistribute",)
_SLICED = (operator.getitem,)


def _projection(node: fx.Node) -> Head | None:
    """The linear layer that ``node`` is, if it is one."""
    if node.target is logits_from:
        hidden, weight, bias, spec = node.args
        inner, outer, columns = ast.literal_eval(str(spec))
        given = Head(hidden, weight, bias=bias)  # type: ignore[arg-type]
        return replace(given, curve=Curve(inner, outer), columns=columns)
    if node.target in _LINEAR:
        hidden, weight, bias = (*node.args, None)[:3] if len(node.args) > 1 else (None,) * 3
        bias = node.kwargs.get("bias", bias)
        if isinstance(hidden, fx.Node) and isinstance(weight, fx.Node):
            return Head(hidden, weight, bias=bias if isinstance(bias, fx.Node) else None)
    if node.target in _MATMUL and len(node.args) == 2:
        hidden, weight = node.args
        if isinstance(hidden, fx.Node) and isinstance(weight, fx.Node):
            if value_of(weight).ndim != 2:
                raise Unreadable("logits are a product of two activations")
            return Head(hidden, weight, transposed=True)
    return None


def _source(node: fx.Node) -> fx.Node:
    """What ``node`` changes, if it is one of the operators that a head may end in."""
    known = (*_TIMES, *_DIVIDED, *_PLUS, *_TANH, *_RESHAPED, *_CAST, *_DETACHED, *_PLACED, *_SLICED)
    if node.op in ("call_function", "call_method") and node.target in known:
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


def _require_one_reader(node: fx.Node) -> None:
    if len(node.users) > 1:
        readers = ", ".join(target_name(user) for user in node.users)
        raise Unreadable(f"logits are read on their way by {readers}")


def _followed(head: Head, step: fx.Node) -> Head:
    """``head`` with one more operator behind it."""
    target, source = step.target, _source(step)
    if target in _TIMES or target in _DIVIDED:
        factor = _number(step, source)
        if target in _DIVIDED and step.args[0] is not source:
            raise Unreadable("logits are what something is divided by")
        return replace(head, curve=head.curve.times(1 / factor if target in _DIVIDED else factor))
    if target in _TANH:
        return replace(head, curve=head.curve.bent())
    if target in _DETACHED:
        return replace(head, detached=True)
    if target in _PLACED:
        return head
    if target in _PLUS:
        return _with_bias(head, step, source)
    if target in _CAST:
        return _cast(head, step, source)
    if target in _RESHAPED:
        return _reshaped(head, step, source)
    return _sliced(head, step, source)


def _number(step: fx.Node, source: fx.Node) -> float:
    others = [value for value in (*step.args, *step.kwargs.values()) if value is not source]
    if len(others) != 1 or not isinstance(others[0], (int, float)):
        raise Unreadable(f"logits pass through {target_name(step)} by what is no constant")
    factor = float(others[0])
    if factor == 0 or not math.isfinite(factor):
        raise Unreadable(f"logits pass through {target_name(step)} by {factor}")
    return factor


def _with_bias(head: Head, step: fx.Node, source: fx.Node) -> Head:
    others = [value for value in step.args if value is not source]
    size = value_of(source).shape[-1]
    if len(others) == 1 and isinstance(others[0], fx.Node) and not step.kwargs:
        value = value_of(others[0])
        plain = head.bias is None and head.curve == Curve() and head.columns is None
        like = value.dtype == value_of(source).dtype and value.shape[-1:] == (size,)
        if plain and like and value.numel() == size:
            return replace(head, bias=others[0])
    raise Unreadable(f"logits come from {target_name(step)}, not from a linear layer")


def _cast(head: Head, step: fx.Node, source: fx.Node) -> Head:
    before, after = value_of(source), value_of(step)
    if after.dtype not in (before.dtype, torch.float32) or after.device != before.device:
        raise Unreadable(f"logits are cast from {before.dtype} to {after.dtype} on {after.device}")
    return head


def _reshaped(head: Head, step: fx.Node, source: fx.Node) -> Head:
    """The leading axes are laid out anew: so are the hidden state's."""
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
    """Tokens are taken from the hidden state, columns from the weight."""
    value = value_of(source)
    index, columns = split_index(step.args[1], value.ndim, value.shape[-1])
    if columns != value.shape[-1]:
        head = replace(head, columns=columns)
    if not index:
        return head

    def move(graph: fx.Graph, hidden: fx.Node) -> fx.Node:
        return graph.call_function(operator.getitem, (hidden, index))

    return replace(head, moves=(*head.moves, move))


def is_cut(node: fx.Node, source: fx.Node) -> bool:
    """Whether ``node`` is the first columns of ``source``, and all of its tokens."""
    if node.target is not operator.getitem or node.args[0] is not source:
        return False
    try:
        head = _sliced(Head(source, source), node, source)
    except Unreadable:
        return False
    return not head.moves


def target_name(node: fx.Node) -> str:
    """A node's operator as a reader knows it."""
    if node.op == "output":
        return "the output"
    if node.op == "placeholder":
        return "the model, which makes them"
    return str(getattr(node.target, "__name__", node.target))
