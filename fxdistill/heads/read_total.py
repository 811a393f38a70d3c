"""Read the total backwards: which losses on logits it has, of which values, with which weights.

The objective has a fixed form in the graph, Σ weight · loss over a few summands. A user's own loss
can be read too, if it is a sum of this library's divergences with constant coefficients.
"""

import ast
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxdistill.base.ranks import over_ranks, total_over_ranks
from fxdistill.heads.curve import Unreadable
from fxdistill.heads.read_head import target_name
from fxdistill.losses import cross_entropy
from fxdistill.losses.fused.formulas import DIVERGENCES, Divergence
from fxdistill.losses.names import LOGIT_LOSSES
from fxdistill.losses.scores import Asked, token_scores
from fxdistill.objective.denominators import over_items
from fxdistill.objective.importance import factors, with_importance

NAMES: dict[Any, str] = {LOGIT_LOSSES[name]: name for name in DIVERGENCES}
ON_LOGITS = (*NAMES, cross_entropy)
_OPTIONS = {"beta", "temperature", "weights"}  # options of a divergence that vocab_loss takes too
OVER = (over_ranks, total_over_ranks)
_ADD, _MUL = (operator.add, torch.add), (operator.mul, torch.mul)


@dataclass(frozen=True)
class Scored:
    """Weights that follow from scores of the logits that a divergence compares.

    ``keep`` is the share of tokens of which no more have a weight; ``None`` if all may have one.
    ``score`` names the score that ``plain`` weights are multiplied by, where that is all, and
    nothing else reads ``nodes``.
    """

    scores: fx.Node
    keep: tuple[int, int] | None
    plain: Any
    score: str
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Summand:
    """``weight · Σ coefficient · loss``; with ``items``, these are the losses' denominator."""

    weight: Any
    parts: tuple[tuple[float, fx.Node], ...]
    items: Any
    nodes: tuple[fx.Node, ...]  # from the product back to the losses
    told: tuple[fx.Node, ...]  # the detached values that are outputs

    @property
    def product(self) -> fx.Node:
        """The node that the total sums: weight times value."""
        return self.nodes[0]

    @property
    def losses(self) -> tuple[fx.Node, ...]:
        """The nodes of the losses."""
        return tuple(loss for _, loss in self.parts)

    @property
    def is_divergence(self) -> bool:
        """Whether the losses compare with the teacher, rather than with labels."""
        return self.losses[0].target in NAMES

    @property
    def mix(self) -> tuple[Divergence, ...]:
        """The name, coefficient and β of each divergence."""
        for loss in self.losses:
            if unknown := set(loss.kwargs) - _OPTIONS:
                raise Unreadable(f"a divergence has options of its own: {', '.join(unknown)}")
        betas = [loss.kwargs.get("beta", 0.5) for loss in self.losses]
        if not all(isinstance(beta, (int, float)) for beta in betas):
            raise Unreadable("the β of a divergence is no constant")
        return tuple(
            (NAMES[loss.target], factor, float(beta))  # type: ignore[arg-type]
            for (factor, loss), beta in zip(self.parts, betas, strict=True)
        )

    def argument(self, index: int) -> fx.Node:
        """The positional argument at ``index``, which all of the losses must share."""
        if any(len(loss.args) <= index for loss in self.losses):
            raise Unreadable("a loss takes its logits by keyword")
        taken = [loss.args[index] for loss in self.losses]
        if not isinstance(taken[0], fx.Node) or any(value is not taken[0] for value in taken):
            raise Unreadable("the losses of one term read different values")
        return taken[0]

    @property
    def scored(self) -> Scored | None:
        """The scores that the weights follow from, if they do."""
        weights: Any = self.option("weights")
        if not self.is_divergence or getattr(weights, "target", None) is not with_importance:
            return None
        plain, found = weights.args
        scores = found.args[0] if found.target is factors else None
        if scores is None or scores.target is not token_scores:
            return None
        if scores.args != (self.argument(0), self.argument(1)):
            return None
        keep, proportional = ast.literal_eval(found.args[2])
        names = Asked.read(scores.kwargs["asked"]).names
        alone = proportional and len(names) == 1 and self.items is None
        alone = alone and set(weights.users) <= set(self.losses)
        alone = alone and len(found.users) == len(scores.users) == 1
        return Scored(scores, keep, plain, names[0] if alone else "", (weights, found, scores))

    def option(self, name: str, default: Any = None) -> Any:
        """The keyword argument ``name``, which all of the losses must share."""
        given = [loss.kwargs.get(name, default) for loss in self.losses]
        if any(value is not given[0] and value != given[0] for value in given):
            raise Unreadable(f"the losses of one term differ in {name}")
        return given[0]


def read_total(graph: fx.Graph) -> tuple[fx.Node, tuple[Summand, ...]]:
    """The node that stacks the summands of the total, and those summands that are of logits.

    Raises Unreadable where the total, or a loss on logits in it, has another form.
    """
    out = graph.output_node()
    for stack in graph.find_nodes(op="call_function", target=torch.stack):
        if any(user.target == "sum" and out in _ends(user) for user in stack.users):
            found = [_summand(node) for node in stack.args[0]]
            return stack, tuple(summand for summand in found if summand is not None)
    raise Unreadable("the total is no sum of terms")


def _ends(node: fx.Node) -> list[fx.Node]:
    """The nodes that read ``node``, directly or through its sum over ranks."""
    return [end for user in node.users for end in (user.users if user.target in OVER else [user])]


def _summand(product: Any) -> Summand | None:
    """Read ``product`` as a summand of losses on logits; ``None`` if it is something else."""
    if not isinstance(product, fx.Node) or product.target is not operator.mul:
        return None
    weight, value = product.args
    if not isinstance(value, fx.Node):
        return None
    nodes, items, mean = [product, value], None, value
    if value.target is over_items:
        mean, items = value.args[0], value.args[3]  # type: ignore[assignment]
    parts = _mix(mean, 1.0, nodes)
    if not parts:
        return None
    labelled = any(loss.target is cross_entropy for _, loss in parts)
    if labelled and (len(parts) > 1 or parts[0][0] != 1.0):
        raise Unreadable("a label loss is part of a user's own loss")
    if len({loss.target is cross_entropy for _, loss in parts}) > 1:
        raise Unreadable("a divergence and a label loss are one term")
    told = tuple(user for user in value.users if _is_told(user))
    nodes = list(dict.fromkeys(nodes))
    for node in nodes[1:]:
        for user in node.users:
            if user not in nodes and user not in told:
                raise Unreadable(f"the value of a loss is read by {target_name(user)}")
    summand = Summand(weight, tuple(parts), items, tuple(nodes), told)
    if items is not None and value.args[1] is not summand.option("weights"):
        raise Unreadable("a loss and its number of items count different tokens")
    return summand


def _is_told(node: fx.Node) -> bool:
    """Whether ``node`` is the detached value of a term that the step returns."""
    return node.target == "detach" and all(end.op == "output" for end in _ends(node))


def _mix(node: Any, factor: float, nodes: list[fx.Node]) -> list[tuple[float, fx.Node]]:
    """Read ``node`` as Σ coefficient · loss; empty if it has another form."""
    if not isinstance(node, fx.Node) or (node.kwargs and node.target not in ON_LOGITS):
        return []
    nodes.append(node)
    if node.target in ON_LOGITS:
        return [(factor, node)]
    if node.target in _ADD:
        sides = [_mix(side, factor, nodes) for side in node.args]
        return [part for side in sides for part in side] if all(sides) else []
    if node.target in _MUL:
        a, b = node.args
        number, rest = (a, b) if isinstance(a, (int, float)) else (b, a)
        if isinstance(number, (int, float)):
            return _mix(rest, factor * number, nodes)
    return []
