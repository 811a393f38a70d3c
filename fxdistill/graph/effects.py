"""Which storages the nodes of a captured graph share, and which they write.

Captured graphs mutate values: ``relu(inplace=True)``, ``add_``, running statistics. A pass that
moves or removes nodes calls ``effects_of`` first. The answer comes from running the graph once on
its fake tensors and watching the operators that it dispatches, so there is no list of torch
functions to maintain. Each node keeps in its ``meta`` what its run gave, copies of the graph take
that along, and the next pass runs only what is new: running all of it for every pass was a tenth of
the time that a second process needs to its first step.

Private to torch and used here only: fake-tensor modes found on values, and ``untyped_storage``
identities of fakes. If they move, this file is the one to mend.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from fxdistill.base.transforms import is_of_functorch, unwrapped

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


@dataclass
class Effects:
    """For all nodes, also in checkpointed regions: order of execution, storages and writes."""

    graph: fx.Graph
    place: dict[fx.Node, int] = field(default_factory=dict)
    storages: dict[fx.Node, frozenset[int]] = field(default_factory=dict)
    writes: dict[fx.Node, frozenset[int]] = field(default_factory=dict)

    def written_after(self, value: fx.Node, moment: fx.Node, until: fx.Node | None = None) -> bool:
        """Whether ``value`` or an alias is written at or after ``moment``, and before ``until``."""
        mine, start = self.storages[value], self.place[moment]
        end = len(self.place) if until is None else self.place[until]
        return any(mine & w and start <= self.place[n] < end for n, w in self.writes.items())

    def aliases_input(self, value: fx.Node) -> bool:
        """Whether ``value`` shares the storage of an input, which other programs may write."""
        outside = (n for n in self.place if n.op == "placeholder" and n.graph is self.graph)
        return any(self.storages[value] & self.storages.get(n, frozenset()) for n in outside)

    def live(self, graph: fx.Graph, roots: Iterable[fx.Node] = ()) -> set[fx.Node]:
        """The nodes that outputs, ``roots``, outside storages or the interpreter's state need."""
        outside = frozenset().union(
            *(self.storages.get(n, frozenset()) for n in graph.nodes if n.op in _EXTERNAL)
        )
        writers: dict[int, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            for storage in self.writes.get(node, ()):
                writers[storage].append(node)
        todo = [*roots, *(n for n in graph.nodes if self._must_stay(n, outside))]
        live: set[fx.Node] = set()
        seen: set[int] = set()
        while todo:
            node = todo.pop()
            if node in live:
                continue
            live.add(node)
            todo += node.all_input_nodes
            fresh = self.storages.get(node, frozenset()) - seen
            seen |= fresh
            todo += [writer for storage in fresh for writer in writers.get(storage, ())]
        return live

    def _must_stay(self, node: fx.Node, outside: frozenset[int]) -> bool:
        if node.op in ("placeholder", "output"):
            return True
        if self.writes.get(node, frozenset()) & outside:
            return True
        # A node without value and user runs for its effect (grad mode, autocast, assertions).
        return node.op == "call_function" and not node.users and node not in self.storages


_EXTERNAL = ("placeholder", "get_attr")


def effects_of(gm: fx.GraphModule) -> Effects:
    """Run ``gm`` on its own fake tensors and record what every node shares and writes."""
    examples = [_example(n) for n in gm.graph.nodes if n.op == "placeholder"]
    effects = Effects(gm.graph)
    with _fake(examples), _Watch() as watch:
        _Runner(gm, effects, watch).run(*examples)
    return effects


def _example(node: fx.Node) -> Any:
    """The fake value of an input: dynamo's, or in the body of a loop that of ``make_fx``."""
    return node.meta.get("example_value", node.meta.get("val"))


@contextlib.contextmanager
def _fake(examples: list[Any]) -> Iterator[None]:
    mode = _fake_mode(examples)
    grad, env = torch.is_grad_enabled(), getattr(mode, "shape_env", None)
    fresh = env.ignore_fresh_unbacked_symbols() if env is not None else contextlib.nullcontext()
    try:
        with mode or contextlib.nullcontext(), fresh:
            yield
    finally:
        torch.set_grad_enabled(grad)


def _fake_mode(value: Any) -> FakeTensorMode | None:
    """Find the mode that the fakes belong to.

    torch's own detection does not serve: inside a backend it prefers the mode of the lowering, and
    the graph's fakes are those of the capture.
    """
    for leaf in tree_leaves(value):
        if isinstance(leaf, FakeTensor):
            return leaf.fake_mode
        if is_traceable_wrapper_subclass(leaf):
            return _fake_mode([getattr(leaf, name) for name in leaf.__tensor_flatten__()[0]])
    return None


class _Watch(TorchDispatchMode):
    """Collect the storages that operators write, by their schemas."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            result = func(*args, **kwargs)
            if func.name() not in _PURE and _may_write(result, (args, kwargs)):
                self.written |= _storages((args, kwargs))
            return result
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[index] if index < len(args) else kwargs.get(argument.name)
                self.written |= _storages(given)
        if "batch_norm" in func._schema.name and "backward" not in func._schema.name:
            # The schemas of some batch norms do not say that they write running statistics.
            self.written |= _storages(args[3:5])
        return func(*args, **kwargs)


# Torch refuses functions in these that write; one runs for all places at once, and not by itself.
_PURE = ("flex_attention", "flex_attention_backward")


def _may_write(result: Any, given: Any) -> bool:
    """Whether a higher-order operator may write to its arguments.

    A loop or a branch writes what its bodies write. An operator that returns nothing (a Triton
    kernel) is there to write, but does not say which of its tensors it writes.
    """
    bodies = [leaf for leaf in tree_leaves(given) if isinstance(leaf, fx.GraphModule)]
    return (result is None and not bodies) or any(map(_writes_to_its_inputs, bodies))


def _writes_to_its_inputs(body: fx.GraphModule) -> bool:
    inputs = body.graph.find_nodes(op="placeholder")
    if any(_example(node) is None for node in inputs):
        return True  # unknown: assume that it writes
    effects = effects_of(body)
    theirs = frozenset().union(*(effects.storages[node] for node in inputs))
    return any(theirs & written for written in effects.writes.values())


_RUN = "fxdistill_run"  # in meta: what running the node gave


@dataclass(frozen=True)
class _Run:
    """How a node ran: on what, and what came of it."""

    target: Any
    given: tuple[Any, ...]
    value: Any
    shapes: list[Any]
    written: frozenset[int]

    def serves(self, target: Any, given: tuple[Any, ...]) -> bool:
        """Whether the same would come of ``target`` on the values ``given``."""
        # The shape of a value may have been changed in place after it was computed.
        alike = self.target is target and _same(self.given, given)
        return alike and self.shapes == _shapes(self.value)


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are one: tensors and symbolic sizes by identity."""
    if a is b:
        return True
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, slice) and isinstance(b, slice):
        return _same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    return type(a) is type(b) and isinstance(a, (bool, int, float, str)) and a == b


def _shapes(value: Any) -> list[Any]:
    """The sizes of all tensors in a value, by identity where they are symbolic."""
    leaves = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    return [[s if type(s) is int else id(cast(Any, s).node) for s in leaf.shape] for leaf in leaves]


class _Runner(fx.Interpreter):
    """Run a graph, and the bodies of its checkpointed regions, node by node."""

    def __init__(self, gm: fx.GraphModule, effects: Effects, watch: _Watch) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.effects, self.watch = effects, watch
        # Inside of a transform, values belong to a level that exists during one run.
        self.keeps = not any(map(is_of_functorch, gm.graph.nodes))

    def _result(self, n: fx.Node) -> Any:
        """Run a node, or take what an earlier run gave; what has no value runs for its effect."""
        called = n.op == "call_function" or n.op == "call_method"
        if not (self.keeps and called) or isinstance(n.target, HigherOrderOperator):
            return super().run_node(n)
        given = self.fetch_args_kwargs_from_env(n)
        run = n.meta.get(_RUN)
        if run is not None and run.serves(n.target, given):
            self.watch.written = set(run.written)
            return run.value
        result = super().run_node(n)
        if any(isinstance(leaf, (Tensor, torch.SymInt)) for leaf in tree_leaves(result)):
            written = frozenset(self.watch.written)
            n.meta[_RUN] = _Run(n.target, given, result, _shapes(result), written)
        return result

    def run_node(self, n: fx.Node) -> Any:
        outer, self.watch.written = self.watch.written, set()
        self.effects.place[n] = len(self.effects.place)
        result = self._result(n)
        tensors = any(isinstance(leaf, (Tensor, torch.SymInt)) for leaf in tree_leaves(result))
        if tensors or (result is not None and not is_of_functorch(n)):
            self.effects.storages[n] = _storages(result)
        if _name(n) in _MARKS:
            self.watch.written |= _storages(result)
        if self.watch.written:
            self.effects.writes[n] = frozenset(self.watch.written)
        self.watch.written |= outer
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is CHECKPOINT:
            body, *inputs = args
            return _Runner(body, self.effects, self.watch).run(*inputs)
        if isinstance(target, HigherOrderOperator) and target.name() in _PURE:
            with torch.no_grad():  # its autograd would take the fake mode of the lowering
                return super().call_function(target, args, kwargs)
        return super().call_function(target, args, kwargs)


# These write to no storage, but count as writes: autograd reads the flag that they set.
_MARKS = ("requires_grad_", "_set_tensor_requires_grad")


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _storages(value: Any) -> frozenset[int]:
    found: set[int] = set()
    for leaf in tree_leaves(value):
        if is_traceable_wrapper_subclass(leaf):
            names, _ = leaf.__tensor_flatten__()
            found |= _storages([getattr(leaf, name) for name in names])
        elif isinstance(leaf, Tensor):
            found.add(unwrapped(leaf).untyped_storage()._cdata)
    return frozenset(found)
