"""The logits of several teachers for a chunk of tokens, as the logits of their mean.

The loop over chunks projects each teacher's hidden states into a buffer and mixes the buffers, a
few rows at a time, into one: to the body of a chunk there is one teacher whose head is plain.
"""

import ast
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxdistill.base.nodes import own_code
from fxdistill.losses.fused.call import HeadSide
from fxdistill.losses.fused.chunk import through_head
from fxdistill.losses.mixture import Pooled, mean_of_teachers

Curve = tuple[float, float | None]  # the scale and the cap of a head


class MixSpec(NamedTuple):
    """How teachers are mixed: what is averaged, and the curve of each head."""

    pooled: Pooled
    curves: tuple[Curve, ...]

    @property
    def text(self) -> str:
        """The spec as text, which an operator takes."""
        return repr(tuple(self))

    @classmethod
    def read(cls, text: str) -> "MixSpec":
        """Read the spec back."""
        return cls(*ast.literal_eval(text))


def packed(sides: Sequence[HeadSide]) -> list[Tensor]:
    """The operands of heads as one list of tensors; a missing bias is an empty one."""
    found: list[Tensor] = []
    for side in sides:
        bias = side.hidden.new_empty(0) if side.bias is None else side.bias
        found += [side.hidden, side.weight, bias]
    return found


def unpacked(tensors: Sequence[Tensor]) -> list[HeadSide]:
    """The heads again."""
    sides = zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True)
    return [HeadSide(h, w, b if b.numel() else None) for h, w, b in sides]


def columns_of_mean(columns: int, itemsize: int) -> int:
    """The size of the mean's buffer a token, in columns of logits of ``itemsize`` bytes."""
    return columns * max(4, itemsize) // itemsize


class Rows(NamedTuple):
    """How many tokens are mixed at a time, of how many columns, and whether that is compiled."""

    tokens: int
    columns: int
    compiled: bool


@functools.cache
def _mean(spec: MixSpec, columns: int, compiled: bool) -> Callable[..., None]:
    """The body that writes the mean of teachers' raw logits ``[c, V_k]``; compiled for one c."""

    def mean(raw: list[Tensor], shares: Tensor, tau: Tensor, out: Tensor) -> None:
        logits = [
            through_head(z, scale, cap)[0][:, :columns]
            for z, (scale, cap) in zip(raw, spec.curves, strict=True)
        ]
        out.copy_(mean_of_teachers(logits, shares, temperature=tau, pooled=spec.pooled))

    return torch.compile(own_code(mean), fullgraph=True, dynamic=False) if compiled else mean


class Mixing:
    """The buffers of one call for teachers behind the first, and for the mean of all."""

    def __init__(self, others: Sequence[HeadSide], spec: MixSpec, size: int, rows: Rows) -> None:
        self.others, self.rows = others, rows
        self.write = _mean(spec, rows.columns, rows.compiled)
        self.buffers = [side.hidden.new_empty(size, side.weight.shape[0]) for side in others]
        kind = others[0].hidden.dtype
        kind = torch.float64 if kind == torch.float64 else torch.float32
        self.mean = others[0].hidden.new_empty(size, rows.columns, dtype=kind)

    def mixed(
        self, first: Tensor, taken: Callable[[Tensor], Tensor], shares: Tensor, tau: Tensor
    ) -> Tensor:
        """The logits of the mean, of the tokens whose ``first`` teacher's raw logits these are.

        ``taken(hidden)`` are the hidden states of the chunk.
        """
        raw = [first]
        for side, buffer in zip(self.others, self.buffers, strict=True):
            out = buffer[: len(first)]
            if side.bias is None:
                torch.mm(taken(side.hidden), side.weight.T, out=out)
            else:
                torch.addmm(side.bias, taken(side.hidden), side.weight.T, out=out)
            raw.append(out)
        mean = self.mean[: len(first)]
        for start in range(0, len(first), self.rows.tokens):
            here = slice(start, start + self.rows.tokens)
            self.write([z[here] for z in raw], shares, tau, mean[here])
        return mean
