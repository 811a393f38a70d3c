"""Put a fused loss in the place of losses on logits, and remove what nothing reads then."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, fx

from fxdistill.base.figures import size
from fxdistill.graph.effects import Effects
from fxdistill.graph.sections import SECTION
from fxdistill.heads.read_head import Head
from fxdistill.heads.read_total import ON_LOGITS, Summand


def item(graph: fx.Graph, source: fx.Node, index: int, value: Any) -> fx.Node:
    """The node of ``source[index]``, whose fake tensor is ``value``."""
    node = graph.call_function(operator.getitem, (source, index))
    node.meta["example_value"] = value
    return node


def mark_as_objective(graph: fx.Graph, before: Iterable[fx.Node]) -> None:
    """Note that the nodes which were not there ``before`` belong to the objective."""
    old = set(before)
    for new in [node for node in graph.nodes if node not in old]:
        new.meta["custom"] = {SECTION: "objective"}


def replace_summands(
    stack: fx.Node,
    total: fx.Node,
    values: Sequence[tuple[Summand, fx.Node]],
    heads: Iterable[Head],
    read: Iterable[fx.Node] = (),
) -> None:
    """Replace summands by the fused ``total``, and erase the nodes that nothing reads now.

    ``values`` are the summands with the nodes of their values, ``heads`` those that the fused form
    applies itself. ``read`` are further nodes between heads and losses.
    """
    summands = [summand for summand, _ in values]
    products = [summand.product for summand in summands]
    kept = [node for node in stack.args[0] if node not in products]  # type: ignore[union-attr]
    stack.args = ([total, *kept],)
    for summand, value in values:
        for told in summand.told:
            told.replace_all_uses_with(value)
    dead = {node for s in summands for node in (*s.nodes, *s.told, *s.losses)}
    dead |= {node for loss in dead if loss.target in ON_LOGITS for node in loss.all_input_nodes}
    for head in heads:
        dead.update(head.nodes if head.gathered is None else (*head.nodes, head.gathered))
    dead.update(read)
    for node in reversed(list(stack.graph.nodes)):
        if node in dead and not node.users and node.op != "placeholder":
            stack.graph.erase_node(node)


def erase_dead(graph: fx.Graph, effects: Effects) -> None:
    """Remove dead code: a dead reader of the logits must not keep them from being fused."""
    live = effects.live(graph)
    for node in reversed(list(graph.nodes)):
        if node not in live:
            graph.erase_node(node)


def remark_on(made: list[Tensor], chunk: int, bytes_of_token: int) -> str:
    """The remark, which says how many logits exist at a time."""
    shapes = " and ".join(str([*value.shape]) for value in made)
    tokens = made[0].numel() // made[0].shape[-1]
    if isinstance(tokens, int) and tokens <= chunk:
        return f"logits fused with their losses; {shapes} are one chunk"
    held = size(chunk * bytes_of_token)
    return f"logits fused with their losses, {chunk} tokens at a time: {held}, not {shapes}"
