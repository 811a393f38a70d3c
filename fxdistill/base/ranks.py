"""Ranks that hold different samples: a loss over all of them, from what each rank has.

Every term is Σ w·value / Σ w over the samples of all ranks. The denominator Σ w is summed over
ranks first; each rank then forms its own values, and their sum over ranks is the term. The backward
on a rank forms the gradient of its own samples; FSDP sums these gradients over ranks, and DDP
averages them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxdistill import base
from fxdistill.base.nodes import one_node


class Ranks(NamedTuple):
    """The process groups over which samples are split, and how many ranks they have.

    ``groups`` are names, one for each mesh dimension. ``averaged``: a wrapper (DDP, FSDP2) averages
    gradients over the ranks, rather than summing them. ``projections``: no wrapper reduces the
    gradients of projections, so the step has to. ``positions`` is where this rank stands in each
    of the groups.
    """

    groups: tuple[str, ...]
    size: int
    averaged: bool = False
    projections: bool = True
    positions: tuple[int, ...] = ()

    @property
    def scale(self) -> float:
        """The factor for this rank's gradient that turns a wrapper's average into the sum."""
        return float(self.size) if self.averaged else 1.0


@one_node
def over_ranks(x: Tensor, groups: tuple[str, ...]) -> Tensor:
    """Σ x over ranks, without gradient."""
    return _sum(x.detach(), groups)


@one_node
def total_over_ranks(total: Tensor, groups: tuple[str, ...], scale: float) -> Tensor:
    """Σ total over ranks; only this rank's ``total`` gets a gradient, times ``scale``."""
    summed: Tensor = _Own.apply(total, _sum(total.detach(), groups), scale)  # type: ignore[no-untyped-call]
    return summed


class _Own(torch.autograd.Function):
    """The value of ``summed``, with the gradient going to ``own``."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, summed: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return summed.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.scale, None, None


@one_node
def shared(parameter: Tensor, groups: tuple[str, ...], scale: float) -> Tensor:
    """``parameter``, replicated; its gradient is summed over ranks and divided by ``scale``."""
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


@one_node
def samples_of_all(x: Tensor, groups: tuple[str, ...], positions: tuple[int, ...]) -> Tensor:
    """The samples ``[B, ...]`` of all ranks, which have equally many; the gradient is of our own.

    A loss of all samples is computed on every rank, which forms the gradient of its own samples.
    Raises RuntimeError, on every rank, where their numbers differ: backends do not look, and would
    write beyond the end.
    """
    everyone: Tensor = _Gathered.apply(x, groups, positions)  # type: ignore[no-untyped-call]
    return everyone


_UNEVEN = (
    "ranks have different numbers of samples, and a loss between samples compares those of all "
    "ranks: give each rank as many (drop_last=True), or the loss across_ranks=False"
)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: tuple[str, ...], positions: tuple[int, ...]) -> Tensor:
        ctx.positions, ctx.sizes = positions, []
        counts = torch.full((1,), x.shape[0], dtype=torch.long, device=x.device)
        for group in groups:
            counts = base.placement.gather_over(counts, group)
        torch._assert_async((counts == x.shape[0]).all(), _UNEVEN)
        for group in groups:
            ctx.sizes.append(x.shape[0])
            x = base.placement.gather_over(x, group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        for count, position in zip(reversed(ctx.sizes), reversed(ctx.positions), strict=True):
            gradient = gradient.narrow(0, position * count, count)
        return gradient, None, None


def of_each_rank(loss: Tensor, ranks: Ranks) -> Tensor:
    """A loss that all ranks have computed whole, as this rank's part of the sum over ranks.

    Its value is divided among them. Its gradient is not: each rank has that of its own samples.
    """
    return loss - loss.detach() * (1 - 1 / ranks.size)


def items_of(weights: Tensor | None, count: int, ranks: Ranks, like: Tensor) -> Tensor:
    """Σ w over all ranks; without weights the sum of their ``count``."""
    if weights is not None:
        return over_ranks(weights.sum(), ranks.groups)
    total = torch.full((), count, dtype=torch.float32, device=like.device)
    return over_ranks(total, ranks.groups)


def _sum(x: Tensor, groups: tuple[str, ...]) -> Tensor:
    summed: Tensor = base.placement.sum_over(x, groups)
    return summed


# The nodes of a captured graph that communicate with other ranks.
ACROSS = (over_ranks, total_over_ranks, shared, samples_of_all)
