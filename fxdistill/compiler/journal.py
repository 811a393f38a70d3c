"""What a distiller remembers of its calls: their shapes, the last program, why graphs were made."""

import copy
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fxdistill.graph.joint import JointProgram

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class _Like:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: Any) -> Any:
        if type(value) is not Tensor:  # a DTensor is remembered as it is
            return value
        return cls(tuple(value.shape), value.dtype, value.device)

    def made(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


def _mapped(fn: Callable[[Any], Any], tree: Any) -> Any:
    """``tree_map``, which goes into mappings of other kinds too (a tokenizer's batch is one)."""

    def one(value: Any) -> Any:
        if not isinstance(value, UserDict):
            return fn(value)
        made = copy.copy(value)
        made.data = _mapped(fn, value.data)
        return made

    return tree_map(one, tree)


class Journal:
    """The last call, and what happened while graphs were made."""

    def __init__(self) -> None:
        self.program: JointProgram | None = None  # the last that was captured
        self.logits_made = ""  # why models that run as they are made logits in the last call
        self.events: list[tuple[str, str]] = []
        self._last: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy has made no graph, and inputs may be what cannot be copied."""
        return Journal().__dict__

    def called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the shapes of a call."""
        self._last = _mapped(_Like.of, (args, kwargs))

    @property
    def last(self) -> Arguments | None:
        """Arguments like those of the last call; their numbers are 0."""
        if self._last is None:
            return None
        inputs: Arguments = _mapped(lambda x: x.made() if isinstance(x, _Like) else x, self._last)
        return inputs

    def made_graph(self, why: str | None) -> None:
        """A graph is being made: the first one, or another because of ``why``."""
        self.events.append(("capture", "first call") if why is None else ("recompile", why))

    def fell_back(self, why: str) -> None:
        """One graph could not be made."""
        self.events.append(("fallback", why))
