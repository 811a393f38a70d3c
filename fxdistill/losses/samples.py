"""Values as samples ``[B, D]``, for losses that compare the samples of a batch with each other."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxdistill.base.figures import number, shown
from fxdistill.base.tensors import on_every_rank, wide
from fxdistill.errors import ShapeError
from fxdistill.losses.reduce import channels_last, counted, is_map


class Samples(NamedTuple):
    """The vector of each sample, ``[B, D]``, and its weight, ``[B]`` or ``None`` (all alike)."""

    vectors: Tensor
    weights: Tensor | None


def samples(value: Tensor, weights: Tensor | None) -> Samples:
    """Reduce tokens ``[B, L, D]`` and maps ``[B, C, *places]`` to the mean over what counts.

    Weights of places (``[B, L]``, ``[B, *places]``) weigh the mean; a sample of which nothing
    counts has the weight 0, any other 1. Weights ``[B]`` are those of the samples. What does not
    count may be anything, NaN too. DTensors are gathered.
    """
    value = on_every_rank(value)
    if value.ndim < 2:
        raise ShapeError(f"a value {shown(value.shape)} has no samples with a width: [B, ..., D]")
    if is_map(value, weights):
        value = channels_last(value)
    if weights is not None and (weights.ndim == 0 or weights.shape != value.shape[: weights.ndim]):
        raise ShapeError(
            f"weights {shown(weights.shape)} are not those of the leading axes of "
            f"{shown(value.shape)}"
        )
    vectors = counted(wide(value), weights)
    if weights is None or weights.ndim == 1:
        places = tuple(range(1, vectors.ndim - 1))
        return Samples(vectors.mean(places) if places else vectors, _in(vectors, weights))
    if weights.ndim >= value.ndim:
        raise ShapeError(f"weights {shown(weights.shape)} leave no width of {shown(value.shape)}")
    return _pooled(vectors, weights.to(vectors.dtype))


def width_of_samples(shape: Sequence[int], tokens: bool) -> int:
    """The width of the samples of values of this shape, whose first two axes may be ``tokens``."""
    value = torch.empty(tuple(shape), device="meta")
    weights = torch.empty(tuple(shape[:2]), device="meta") if tokens and len(shape) > 2 else None
    return samples(value, weights).vectors.shape[1]


def _in(vectors: Tensor, weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.to(vectors.dtype)


def _pooled(vectors: Tensor, weights: Tensor) -> Samples:
    places = tuple(range(1, weights.ndim))
    vectors = vectors.flatten(weights.ndim)
    total = weights.sum(places)
    shares = weights / total.clamp_min(1e-30).reshape(-1, *(1,) * len(places))
    pooled = (vectors * shares.unsqueeze(-1)).sum(places)
    return Samples(pooled, (total != 0).to(vectors.dtype))


def both(
    student: Tensor, teacher: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The samples of both models, whose widths may differ, and the weights of these samples.

    The weights of tokens and places hold for both models.
    """
    s, w = samples(student, weights)
    t, _ = samples(teacher, weights)
    if s.shape[0] != t.shape[0]:
        raise ShapeError(
            f"the student has {number(s.shape[0])} samples and the teacher {number(t.shape[0])}: a "
            "loss between samples compares the same ones of both models"
        )
    return s, t, w
