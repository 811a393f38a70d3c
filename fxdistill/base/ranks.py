"""Ranks that hold different samples: what they count together, and what each adds to the loss.

Every term is Σ w·value over Σ w of all samples. A rank counts its own, Σ w is summed over ranks
before, and the values after. A rank's backward forms the gradient of its own samples; what sums
those of all ranks is FSDP, or DDP, which averages.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxdistill import base
from fxdistill.base.nodes import one_node


class Ranks(NamedTuple):
    """The groups over which samples lie (by name, one a mesh dimension), and how many ranks.

    ``averaged``: gradients are averaged over the ranks, rather than summed. ``projections``: nobody
    else brings together the gradients of projections.
    """

    groups: tuple[str, ...]
    size: int
    averaged: bool = False
    projections: bool = True

    @property
    def scale(self) -> float:
        """What this rank's gradient is multiplied by, so that averaging gives the sum."""
        return float(self.size) if self.averaged else 1.0


@one_node
def over_ranks(x: Tensor, groups: tuple[str, ...]) -> Tensor:
    """Σ x over ranks; a constant."""
    return _sum(x.detach(), groups)


@one_node
def total_over_ranks(total: Tensor, groups: tuple[str, ...], scale: float) -> Tensor:
    """Σ total over ranks; the gradient is that of this rank's own, times ``scale``."""
    summed: Tensor = _Own.apply(total, _sum(total.detach(), groups), scale)  # type: ignore[no-untyped-call]
    return summed


class _Own(torch.autograd.Function):
    """The value of one, the gradient of the other."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, summed: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return summed.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.scale, None, None


@one_node
def shared(parameter: Tensor, groups: tuple[str, ...], scale: float) -> Tensor:
    """``parameter``, alike on all ranks; its gradient is the sum of theirs over ``scale``."""
    whole: Tensor = _Shared.apply(parameter, groups, scale)  # type: ignore[no-untyped-call]
    return whole


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, groups: tuple[str, ...], scale: float) -> Tensor:
        ctx.groups, ctx.scale = groups, scale
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _sum(gradient, ctx.groups) / ctx.scale, None, None


def items_of(weights: Tensor | None, count: int, ranks: Ranks, like: Tensor) -> Tensor:
    """Σ w over all ranks; how many there are, where nothing is weighted."""
    if weights is not None:
        return over_ranks(weights.sum(), ranks.groups)
    total = torch.full((), count, dtype=torch.float32, device=like.device)
    return over_ranks(total, ranks.groups)


def _sum(x: Tensor, groups: tuple[str, ...]) -> Tensor:
    summed: Tensor = base.placement.sum_over(x, groups)
    return summed


# Nodes of a captured graph that need other ranks.
ACROSS = (over_ranks, total_over_ranks, shared)
