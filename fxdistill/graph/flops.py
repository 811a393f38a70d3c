"""Floating point operations of a graph's nodes: products of matrices, attention, the fused head.

The formulas are torch's own (``torch.utils.flop_counter``): a multiplication and an addition count
as two, everything else as nothing. The same formulas count attention on a CPU and layers that are
one operator, which torch leaves out.

Private to torch and used here only: the operators that run with a saved state of random numbers. If
they move, importing this fails.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator
from torch._prims.rng_prims import (
    graphsafe_run_with_rng_state,
    run_and_save_rng_state,
    run_with_rng_state,
)
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from fxdistill.losses.angles import angle_flops
from fxdistill.losses.attention_blocks import block_flops
from fxdistill.losses.fused.call import HeadCall
from fxdistill.losses.fused.operator import HEAD
from fxdistill.losses.fused.peer_operator import peer_flops
from fxdistill.losses.fused.score_operator import SCORES, score_flops

aten = torch.ops.aten
WITH_RANDOM_STATE = (run_with_rng_state, run_and_save_rng_state, graphsafe_run_with_rng_state)


def flops_of(node: fx.Node) -> int:
    """FLOPs of one node of a joint graph."""
    if node.op != "call_function":
        return 0
    target: Any = node.target
    args, kwargs = _values(node)
    if target in WITH_RANDOM_STATE:  # so a checkpoint repeats attention
        first = 1 if target is run_with_rng_state else 0  # after the state
        target, args = args[first], args[first + 1 :]
        kwargs = {name: value for name, value in kwargs.items() if name != "rng_state"}
    if target is HEAD:
        return head_flops(HeadCall(*args, **kwargs))
    if target is SCORES:
        return score_flops(*args)
    if bodies := list(bodies_of(node)):
        return of_bodies(target, [sum(map(flops_of, body.graph.nodes)) for body in bodies], args)
    packet = target if isinstance(target, HigherOrderOperator) else _packet(target)
    if packet in LACKING:
        return int(LACKING[packet](*args))
    if packet not in flop_registry:
        return 0
    formula: Any = flop_registry[packet]
    return int(formula(*args, **kwargs, out_val=node.meta.get("val")))


def _packet(target: Any) -> Any:
    return getattr(target, "overloadpacket", None)


def bodies_of(node: fx.Node) -> Iterator[fx.GraphModule]:
    """The graphs that a loop, branch or region runs; attention's are part of its formula."""
    if not isinstance(node.target, HigherOrderOperator) or node.target in flop_registry:
        return
    holder = node.graph.owning_module
    for given in node.args:
        if isinstance(given, fx.Node) and given.op == "get_attr":
            body = getattr(holder, str(given.target), None)
            if isinstance(body, fx.GraphModule):
                yield body


def of_bodies(target: Any, counts: list[int], args: Any) -> int:
    """FLOPs of an operator whose bodies have FLOPs ``counts``.

    A branch costs as much as its dearer side, ``scan`` and ``map`` their body for each value. How
    often ``while_loop`` and ``associative_scan`` run their body is unknown: it counts once.
    """
    name = str(target)
    if name == "cond":
        return max(counts)
    if name in _LOOPS:
        over = tree_leaves(args[_LOOPS[name]])[0]
        return counts[0] * int(over.shape[0])
    return sum(counts)


# The argument of a loop that holds the values it iterates over, along their first axis.
_LOOPS = {"scan": 2, "map_impl": 1}


def first_argument(node: fx.Node) -> fx.Node:
    """The first argument of an operator that runs with a state of random numbers."""
    first = node.args[2 if node.target is run_with_rng_state else 1]
    assert isinstance(first, fx.Node)
    return first


def _values(node: fx.Node) -> tuple[Any, Any]:
    found: tuple[Any, Any] = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    return found


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


def _multi_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    heads: int,
    weights: Tensor,
    *_: Any,
    **__: Any,
) -> int:
    """``nn.MultiheadAttention`` in eval mode: projections in, attention, projection out."""
    rows, wide = query.numel() // query.shape[-1], int(weights.shape[-1])
    inward = 2 * width * sum(x.numel() for x in (query, key, value))
    split = [(*x.shape[:-2], heads, x.shape[-2], width // heads) for x in (query, key, value)]
    return int(inward + sdpa_flop_count(*split) + 2 * rows * wide * width)


def _encoder_layer(
    source: Tensor, width: int, heads: int, weights: Tensor, *rest: Any, **__: Any
) -> int:
    """``nn.TransformerEncoderLayer`` in eval mode, where it is one operator."""
    rows, inner = source.numel() // source.shape[-1], int(rest[_INNER].shape[0])
    attention = _multi_head(source, source, source, width, heads, weights)
    return int(attention + 2 * 2 * rows * width * inner)


_INNER = 10  # index in ``rest`` of the first weight of the MLP, after those of attention

# Formulas for operators that torch's counter leaves out, our own losses' among them.
LACKING: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._native_multi_head_attention: _multi_head,
    aten._transformer_encoder_layer_fwd: _encoder_layer,
    torch.ops.fxdistill.attention_blocks: block_flops,
    torch.ops.fxdistill.angle_wise: angle_flops,
    torch.ops.fxdistill.peer_vocab_loss: peer_flops,
}


def head_flops(call: HeadCall) -> int:
    """FLOPs inside the fused head: logits of both models, and the gradients that are asked for."""
    products = 1 + ("h" in call.needs) + ("w" in call.needs)
    flops = products * 2 * call.h.numel() * call.w.shape[0]
    if call.t_weight is not None:
        flops += 2 * call.t.numel() * call.t_weight.shape[0]
    for hidden, weight in zip(call.others[::3], call.others[1::3], strict=True):
        flops += 2 * hidden.numel() * weight.shape[0]
    return int(flops)
