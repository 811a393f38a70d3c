"""The ranks that write one checkpoint together; a process without a group is alone."""

import ctypes
import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxdistill import parallel
from fxdistill.errors import FxDistillError


class Party(NamedTuple):
    """This rank, and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank writes what all have alike."""
        return self.rank == 0

    def everyone(self, value: Any) -> list[Any]:
        """The values of all ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = parallel.checkpoints.everyone(value)
        return found

    def of_first(self, value: Any) -> Any:
        """The value of the first rank."""
        return self.everyone(value)[0]

    def agree(self, error: FxDistillError | None, kind: type[FxDistillError]) -> None:
        """Raise ``error``, on every rank, if any rank has one: none is left waiting."""
        texts = self.everyone(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, text in enumerate(texts):
            if text is not None:
                raise kind(f"rank {rank}: {text}")

    def differing(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """The names of tensors whose values on this rank are not those of the first."""
        if self.size == 1:
            return []
        own = {name: _digest(tensor) for name, tensor in tensors.items()}
        first = self.of_first(own)
        return [name for name, digest in own.items() if first.get(name) != digest]


def party() -> Party:
    """The ranks of the process group, if there is one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Party()
    return Party(torch.distributed.get_rank(), torch.distributed.get_world_size())


def _digest(tensor: Tensor) -> str:
    whole = tensor.detach().cpu().contiguous()
    raw = ctypes.string_at(whole.data_ptr(), whole.numel() * whole.element_size())
    return hashlib.sha256(raw).hexdigest()
