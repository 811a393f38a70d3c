"""Helpers for single tensors that dynamo can trace, without importing torch.distributed."""

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def scalar(value: Any, device: torch.device) -> Tensor:
    """``value`` as a 0-d tensor on ``device``; neither way of making it blocks the host."""
    if isinstance(value, Tensor):
        moved = value.detach().to(device=device, dtype=torch.float32, non_blocking=True)
        return moved.reshape(())
    return torch.full((), float(value), device=device)


def is_placed(x: object) -> "TypeGuard[DTensor]":
    """Whether ``x`` is a DTensor, by an attribute: dynamo can trace it, and nothing is imported."""
    return hasattr(x, "placements")


def is_lazy(x: object) -> bool:
    """Whether ``x`` belongs to a lazy layer that has not run: it has no shape yet."""
    return isinstance(x, (nn.UninitializedParameter, nn.UninitializedBuffer))


def on_every_rank(x: Tensor) -> Tensor:
    """The whole of ``x`` as a plain tensor; the gradient of a DTensor goes back to its shards.

    A loss that the user wrote, or that compares samples, is then as right as on one device. On
    shards it often would not be: the gradient of torch's own mean of squares is too large by the
    number of ranks.
    """
    return x.full_tensor() if is_placed(x) else x


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 (float64 stays): losses are not formed in half precision."""
    return x if x.dtype == torch.float64 else x.float()
