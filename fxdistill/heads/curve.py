"""The form of a head: how logits follow from the hidden state and the weight."""

import ast
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxdistill.base.nodes import one_node


class Unreadable(Exception):
    """A graph or a module does not have the form that is sought; the message says why."""


@dataclass(frozen=True)
class Curve:
    """What a head does to each output x of its linear layer: a·x, or b·tanh(a·x)."""

    inner: float = 1.0  # a
    outer: float | None = None  # b; None: there is no tanh

    def times(self, factor: float) -> "Curve":
        """The curve, followed by a multiplication."""
        if self.outer is None:
            return replace(self, inner=self.inner * factor)
        return replace(self, outer=self.outer * factor)

    def bent(self) -> "Curve":
        """The curve, followed by a tanh."""
        if self.outer is not None:
            raise Unreadable("logits pass through two tanh")
        return replace(self, outer=1.0)

    @property
    def softcap(self) -> float | None:
        """The c of c·tanh(scale·x / c); ``None`` if there is no tanh."""
        return self.outer

    @property
    def scale(self) -> float:
        """The scale of scale·x, or of c·tanh(scale·x / c)."""
        return self.inner if self.outer is None else self.inner * self.outer


@dataclass(frozen=True)
class Form:
    """How logits follow from the hidden state: ``curve(hidden @ weight.T + bias)[..., :columns]``.

    ``bias`` is a graph node or a tensor. Each method appends one operator to the logits, and raises
    Unreadable where the result would not have this form; ``name`` is the operator's, for the
    message.
    """

    curve: Curve = Curve()
    bias: Any = None
    columns: int | None = None  # how many entries of the vocabulary are used; None: all

    def scaled(self, number: Any, name: str, *, divided: bool) -> "Form":
        """Multiply, or divide, the logits by a number."""
        if not isinstance(number, (int, float)):
            raise Unreadable(f"logits pass through {name} by what is no constant")
        factor = float(number)
        if factor == 0 or not math.isfinite(factor):
            raise Unreadable(f"logits pass through {name} by {factor}")
        return replace(self, curve=self.curve.times(1 / factor if divided else factor))

    def bent(self) -> "Form":
        """Apply a tanh."""
        return replace(self, curve=self.curve.bent())

    def with_bias(self, bias: Any, value: Tensor, logits: Tensor, name: str) -> "Form":
        """Add ``bias`` to ``logits``; ``value`` has the shape and the dtype of the bias."""
        plain = self == Form()
        size = logits.shape[-1]
        like = value.dtype == logits.dtype and value.shape[-1:] == (size,)
        if not plain or not like or value.numel() != size:
            raise Unreadable(f"logits come from {name}, not from a linear layer")
        return replace(self, bias=bias)

    def cut(self, columns: int, size: int) -> "Form":
        """Cut the vocabulary to the first ``columns`` of ``size`` entries."""
        return self if columns == size else replace(self, columns=columns)

    @property
    def text(self) -> str:
        """The curve and the columns as text: dynamo would make numbers symbolic."""
        return repr((self.curve.inner, self.curve.outer, self.columns))

    @classmethod
    def read(cls, text: str, bias: Any = None) -> "Form":
        """Read a form from its ``text``."""
        inner, outer, columns = ast.literal_eval(text)
        return cls(Curve(inner, outer), bias, columns)


@one_node
def logits_from(hidden: Tensor, weight: Tensor, bias: Tensor | None, spec: str) -> Tensor:
    """Compute the logits of a head; in the graph of the losses this node stands for a stand-in.

    ``hidden`` is ``[..., D]``, ``weight`` ``[V, D]``, ``bias`` ``[V]``; ``spec`` is ``Form.text``.
    """
    form = Form.read(spec, bias)
    rows = slice(form.columns)
    x = torch.nn.functional.linear(hidden, weight[rows], None if bias is None else bias[rows])
    inner, outer = form.curve.inner, form.curve.outer
    x = x if inner == 1.0 else x * inner
    return x if outer is None else outer * torch.tanh(x)
