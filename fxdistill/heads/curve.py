"""What a head makes of the numbers that its weight gives: a curve, a bias, the first columns."""

import ast
import math
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


@dataclass(frozen=True)
class Form:
    """How logits come from what a weight gives: plus ``bias``, along ``curve``, ``columns`` of it.

    ``bias`` is a node of a graph or a tensor. Each method is one more operator behind the logits;
    Unreadable says why that cannot be said in this form. ``name`` is the operator's, for that.
    """

    curve: Curve = Curve()
    bias: Any = None
    columns: int | None = None  # of the vocabulary, where not all are used

    def scaled(self, number: Any, name: str, *, divided: bool) -> "Form":
        """Multiplied, or divided, by a number."""
        if not isinstance(number, (int, float)):
            raise Unreadable(f"logits pass through {name} by what is no constant")
        factor = float(number)
        if factor == 0 or not math.isfinite(factor):
            raise Unreadable(f"logits pass through {name} by {factor}")
        return replace(self, curve=self.curve.times(1 / factor if divided else factor))

    def bent(self) -> "Form":
        """Through a tanh."""
        return replace(self, curve=self.curve.bent())

    def with_bias(self, bias: Any, value: Tensor, logits: Tensor, name: str) -> "Form":
        """Plus ``bias``, whose value is like ``value``; ``logits`` are what it is added to."""
        plain = self == Form()
        size = logits.shape[-1]
        like = value.dtype == logits.dtype and value.shape[-1:] == (size,)
        if not plain or not like or value.numel() != size:
            raise Unreadable(f"logits come from {name}, not from a linear layer")
        return replace(self, bias=bias)

    def cut(self, columns: int, size: int) -> "Form":
        """The first ``columns`` of ``size``."""
        return self if columns == size else replace(self, columns=columns)

    @property
    def text(self) -> str:
        """Curve and columns as text: dynamo would make numbers symbolic."""
        return repr((self.curve.inner, self.curve.outer, self.columns))

    @classmethod
    def read(cls, text: str, bias: Any = None) -> "Form":
        """The inverse of ``text``."""
        inner, outer, columns = ast.literal_eval(text)
        return cls(Curve(inner, outer), bias, columns)


@one_node
def logits_from(hidden: Tensor, weight: Tensor, bias: Tensor | None, spec: str) -> Tensor:
    """The logits of a head: how the losses are handed those that were not made yet.

    ``spec`` is the text of a ``Form``.
    """
    form = Form.read(spec, bias)
    rows = slice(form.columns)
    x = torch.nn.functional.linear(hidden, weight[rows], None if bias is None else bias[rows])
    inner, outer = form.curve.inner, form.curve.outer
    x = x if inner == 1.0 else x * inner
    return x if outer is None else outer * torch.tanh(x)
