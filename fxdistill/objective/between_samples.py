"""Terms that compare the samples of a batch with each other: what a sample is, and whose there are.

Tokens and places are pooled, each model's by its own weights. In classification the weights of
samples weigh their pairs; elsewhere the weights of tokens weigh the mean over tokens, and a sample
of which nothing counts has no part.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxdistill.base.ranks import Ranks, of_each_rank, samples_of_all
from fxdistill.losses.samples import Samples, samples
from fxdistill.objective.beside import Beside, shared_by
from fxdistill.objective.term import Term


class Sides(NamedTuple):
    """The samples of both models, ``[B, D]`` and ``[B, D_T]``, and the weights of the samples."""

    student: Tensor
    teacher: Tensor
    weights: Tensor | None


def sampled(
    sides: tuple[Tensor, Tensor],
    of_places: tuple[Tensor | None, Tensor | None],
    of_samples: Tensor | None,
) -> Sides:
    """Pool both values to samples; a sample counts if it counts in both models."""
    s, t = (samples(x, w) for x, w in zip(sides, of_places, strict=True))
    weights = of_samples
    for side in (s, t):
        weights = side.weights if weights is None else _times(weights, side)
    return Sides(s.vectors, t.vectors, weights)


def _times(weights: Tensor, side: Samples) -> Tensor:
    return weights if side.weights is None else weights * side.weights


def compared_on_ranks(term: Term, sides: Sides, beside: Beside, ranks: Ranks | None) -> Tensor:
    """The term's loss, as this rank's part of the sum over ranks."""
    if term.module is None:
        loss = term.loss
    else:  # of the modules, CRD alone compares samples
        module: Any = beside.losses[term.module]
        sides = Sides(*shared_by(module.embedding, ranks)(*sides))
        loss = module.compare
    if ranks is None:
        return loss(*sides)
    if not term.kind.across:
        return loss(*sides) / ranks.size
    return of_each_rank(loss(*_of_all(sides, ranks)), ranks)


def _of_all(sides: Sides, ranks: Ranks) -> Sides:
    """The samples of all ranks, with their weights."""
    s, t, w = sides
    w = s.new_ones(s.shape[0]) if w is None else w.to(s.dtype)
    packed = torch.cat([s, t.to(s.dtype), w[:, None]], 1)  # one collective for the three
    everyone = samples_of_all(packed, ranks.groups, ranks.positions)
    s, t, w = everyone.split([s.shape[1], t.shape[1], 1], 1)
    return Sides(s, t, w.squeeze(1))
