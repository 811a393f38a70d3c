"""FLOPs of captured graphs, whose nodes are calls as models write them.

Each call is repeated on the fake tensors of its arguments under torch's FLOP counter, which counts
all operators inside a function. Nothing is computed.
"""

import operator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fxdistill.graph.flops import LACKING, head_flops, of_bodies
from fxdistill.losses.fused.call import HeadCall
from fxdistill.losses.fused.operator import HEAD
from fxdistill.losses.fused.score_operator import SCORES, score_flops


class Costs:
    """FLOPs of nodes, each found once: passes copy nodes from graph to graph."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], int | None] = {}

    def flops(self, node: fx.Node, gm: fx.GraphModule) -> int | None:
        """FLOPs of one call, or of the regions that it calls; ``None`` if they are unknown."""
        if node.op not in ("call_function", "call_method"):
            return 0
        key = (node.name, str(node.target), str(node.args))
        if key not in self._known:
            self._known[key] = self._found(node, gm)
        return self._known[key]

    def _found(self, node: fx.Node, gm: fx.GraphModule) -> int | None:
        if regions := list(_regions(node, gm)):
            counts = [_total(region) for region in regions]
            known = [count for count in counts if count is not None]
            args = fx.node.map_arg(node.args, _value)
            return of_bodies(node.target, known, args) if len(known) == len(counts) else None
        if not _may_multiply(node):
            return 0
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), _value)
        fake = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)), None)
        counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
        if fake is None:
            return 0
        try:
            with torch.no_grad(), fake.fake_mode, counter:
                _call(node, args, kwargs)
            return int(counter.get_total_flops())
        except Exception:  # a function may refuse fake tensors: then its cost is unknown
            return None


def _total(region: fx.GraphModule) -> int | None:
    costs = Costs()
    found = [costs.flops(node, region) for node in region.graph.nodes]
    known = [count for count in found if count is not None]
    return sum(known) if len(known) == len(found) else None


def _regions(node: fx.Node, gm: fx.GraphModule) -> Any:
    """The graphs that a higher-order operator calls; of an autograd.Function only the forward."""
    if node.target in flop_registry:  # attention: its bodies are parts of a formula
        return
    for argument in node.args:
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            region = getattr(gm, str(argument.target), None)
            if isinstance(region, fx.GraphModule):
                yield region
                if "autograd_function" in str(node.target):
                    return


def _may_multiply(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return False
    if getattr(node.target, "__module__", "") in ("_operator", "operator"):
        return node.target is operator.matmul
    return True


def _value(node: fx.Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def _call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _raw(formula: Any) -> Any:
    """Mark a formula, so that the counter gives it tensors rather than shapes."""

    def counted(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return int(formula(*args, **kwargs))

    counted._get_raw = True  # type: ignore[attr-defined]
    return counted


_FORMULAS = {packet: _raw(formula) for packet, formula in LACKING.items()}
_FORMULAS[HEAD.overloadpacket] = _raw(lambda *args: head_flops(HeadCall(*args)))
_FORMULAS[SCORES.overloadpacket] = _raw(score_flops)
