"""A distiller's journal: the shapes of its last call, its last program, why it compiled graphs."""

import copy
import logging
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fxdistill.graph.joint import JointProgram

_LOG = logging.getLogger("fxdistill.compiler")
_OTHER_KIND = "a call of another kind (with labels or without, in training or in evaluation)"
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class _Like:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: Any) -> Any:
        if type(value) is not Tensor:  # a DTensor, for one, is kept as it is
            return value
        return cls(tuple(value.shape), value.dtype, value.device)

    def made(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


def _mapped(fn: Callable[[Any], Any], tree: Any) -> Any:
    """``tree_map`` that also maps the values of a ``UserDict``, such as a tokenizer's batch."""

    def one(value: Any) -> Any:
        if not isinstance(value, UserDict):
            return fn(value)
        made = copy.copy(value)
        made.data = _mapped(fn, value.data)
        return made

    return tree_map(one, tree)


class Journal:
    """The last call, the last captured program, and why each graph was compiled."""

    def __init__(self) -> None:
        self.program: JointProgram | None = None  # the last one captured
        self.logits_made = ""  # why regional mode made the logits in the last call
        self.events: list[tuple[str, str]] = []
        self._last: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """An empty journal: a copy has compiled no graph, and inputs need not be copyable."""
        return Journal().__dict__

    def called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the arguments of a call, with shapes in place of tensors."""
        self._last = _mapped(_Like.of, (args, kwargs))

    @property
    def last(self) -> Arguments | None:
        """Arguments like those of the last call, with tensors of zeros."""
        if self._last is None:
            return None
        inputs: Arguments = _mapped(lambda x: x.made() if isinstance(x, _Like) else x, self._last)
        return inputs

    def made_graph(self, why: str | None) -> None:
        """Note that a graph is compiled: the first one, or another because of ``why``.

        Each graph but the first is logged, at level WARNING: it costs as much time as the first.
        """
        if why is None and any(event == "capture" for event, _ in self.events):
            _LOG.warning("compiling another graph: %s", _OTHER_KIND)
        elif why is not None:
            _LOG.warning("compiling the step again: %s", " ".join(why.split()))
        self.events.append(("capture", "first call") if why is None else ("recompile", why))

    def fell_back(self, why: str) -> None:
        """Note why the step could not be captured as one graph."""
        self.events.append(("fallback", why))
