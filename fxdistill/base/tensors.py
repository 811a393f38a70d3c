"""Questions about single tensors, asked so that dynamo can follow and nothing is imported."""

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def scalar(value: Any, device: torch.device) -> Tensor:
    """A 0-d tensor on the device, without waiting for it: neither copy blocks the host."""
    if isinstance(value, Tensor):
        moved = value.detach().to(device=device, dtype=torch.float32, non_blocking=True)
        return moved.reshape(())
    return torch.full((), float(value), device=device)


def is_placed(x: object) -> "TypeGuard[DTensor]":
    """Whether ``x`` is a DTensor; asked so that dynamo can follow, and importing nothing."""
    return hasattr(x, "placements")


def wide(x: Tensor) -> Tensor:
    """At least float32: losses are not formed in half precision."""
    return x if x.dtype == torch.float64 else x.float()
