"""The operators that may follow a head's linear layer, by kind.

Two readers follow them by the rules of ``Form``: ``read_head`` walks a graph backwards from the
logits, and ``unmade`` follows a running model. Both ask this file what an operator does, and
whether a head may have a cast or an index.
"""

import operator
from typing import Any, Literal

import torch
from torch import Tensor

from fxdistill.heads.curve import Unreadable

Kind = Literal[
    "times",
    "divided",
    "tanh",
    "plus",
    "reshaped",
    "cast",
    "detached",
    "placed",
    "sliced",
    "rolled",
]
# Functions, and methods by their names in a graph. _KINDS adds the methods as Tensor has them.
_OF_KIND: dict[Kind, tuple[Any, ...]] = {
    "times": (operator.mul, torch.mul, "mul", "__mul__", "__rmul__"),
    "divided": (operator.truediv, torch.div, torch.true_divide, "div", "__truediv__"),
    "tanh": (torch.tanh, torch.nn.functional.tanh, "tanh"),
    "plus": (operator.add, torch.add, "add", "__add__", "__radd__"),
    "reshaped": (torch.reshape, "reshape", "view"),
    "cast": ("float", "to", "type", "contiguous", "type_as"),
    "detached": (torch.detach, "detach"),
    "placed": ("redistribute",),
    "sliced": (operator.getitem, "__getitem__"),
    "rolled": (torch.roll,),  # of tokens: the target of a head that predicts further ahead
}
_KINDS: dict[Any, Kind] = {op: kind for kind, ops in _OF_KIND.items() for op in ops}
_KINDS |= {
    getattr(Tensor, name): kind
    for name, kind in _KINDS.items()
    if isinstance(name, str) and hasattr(Tensor, name)
}


def classify(target: Any) -> Kind | None:
    """What an operator does to logits; ``None`` for one that no reader follows."""
    return _KINDS.get(target)


def require_lossless(before: torch.dtype, after: torch.dtype) -> None:
    """Raise Unreadable for a cast to another dtype, unless that is float32."""
    if after not in (before, torch.float32):
        raise Unreadable(f"logits are cast from {before} to {after}")


def split_index(given: Any, axes: int, size: int) -> tuple[tuple[Any, ...], int]:
    """Split an index of logits into one of their tokens, ``()`` for all, and a number of columns.

    ``axes`` and ``size`` are the number of axes of the logits and their vocabulary. Raises
    Unreadable unless the columns are the first ones.
    """
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
