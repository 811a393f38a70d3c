"""What a head makes of each number that its weight gives, and the logits it makes so."""

import ast
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxdistill.base.nodes import one_node


class Unreadable(Exception):
    """Why a graph is not of the form that is sought."""


@dataclass(frozen=True)
class Curve:
    """What a head makes of each number its weight gives: a·x, or b·tanh(a·x)."""

    inner: float = 1.0
    outer: float | None = None  # a number: behind a tanh

    def times(self, factor: float) -> "Curve":
        """Followed by a multiplication."""
        if self.outer is None:
            return replace(self, inner=self.inner * factor)
        return replace(self, outer=self.outer * factor)

    def bent(self) -> "Curve":
        """Followed by a tanh."""
        if self.outer is not None:
            raise Unreadable("logits pass through two tanh")
        return replace(self, outer=1.0)

    @property
    def softcap(self) -> float | None:
        """The c of c·tanh(scale·x / c)."""
        return self.outer

    @property
    def scale(self) -> float:
        """The scale of the same."""
        return self.inner if self.outer is None else self.inner * self.outer

    def __str__(self) -> str:
        """For a report."""
        parts = [] if self.scale == 1.0 else [f"scale {self.scale:g}"]
        return ", ".join([*parts, *([] if self.outer is None else [f"softcap {self.outer:g}"])])


@one_node
def logits_from(hidden: Tensor, weight: Tensor, bias: Tensor | None, spec: str) -> Tensor:
    """The logits of a head: how the losses are handed those that were not made yet.

    ``spec`` is a curve and the number of columns, as text.
    """
    inner, outer, columns = ast.literal_eval(spec)
    x = torch.nn.functional.linear(
        hidden, weight[:columns], None if bias is None else bias[:columns]
    )
    x = x if inner == 1.0 else x * inner
    return x if outer is None else outer * torch.tanh(x)


def split_index(given: Any, axes: int, size: int) -> tuple[tuple[Any, ...], int]:
    """An index of logits as one of their tokens (empty for all) and a number of first columns."""
    index = list(given) if isinstance(given, (tuple, list)) else [given]
    if None in index or index.count(Ellipsis) > 1:
        raise Unreadable("logits are indexed so that they get more axes")
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index[at : at + 1] = [slice(None)] * (axes - len(index) + 1)
    part = index.pop() if len(index) == axes else slice(None)
    if not isinstance(part, slice) or part.start not in (None, 0) or part.step not in (None, 1):
        raise Unreadable("logits are cut to columns that are not the first ones")
    if not isinstance(part.stop, (int, type(None))):
        raise Unreadable("vocabulary has no fixed size")
    every = all(isinstance(axis, slice) and axis == slice(None) for axis in index)
    return () if every else tuple(index), len(range(*part.indices(size)))
