"""Helpers for gradients that are formed in the forward: which are wanted, how they scale."""

import torch
from torch import Tensor

from fxdistill.base.tensors import wide
from fxdistill.errors import StepError


def require_indices(name: str, indices: Tensor | None, size: int) -> None:
    """Assert on the device that all indices are in range, so that the host does not wait."""
    if indices is not None:
        inside = (indices >= 0) & (indices < size)
        text = f"a {name} is outside of the student's vocabulary of {size}"
        torch._assert_async(inside.all(), text)


def scaled(gradient: Tensor, by: Tensor) -> Tensor:
    """``gradient`` times ``by``, in float32 at least: half precision may not hold the factor."""
    return (wide(gradient) * by).to(gradient.dtype)


def gradients_wanted(h: Tensor, w: Tensor, bias: Tensor | None) -> str:
    """Which gradients to form, a letter each: ``h`` hidden state, ``w`` weight, ``b`` bias."""
    given = (("h", h), ("w", w), ("b", bias))
    grad = torch.is_grad_enabled()
    return "".join(n for n, x in given if grad and x is not None and x.requires_grad)


_UNFUSED = (
    "wrap(..., compile={'fuse_head': False}), or the divergence and cross entropy of logits, have."
)


def require_first_order(what: str = "the fused head", instead: str = _UNFUSED) -> None:
    """Raise StepError if a backward is to be differentiated: its gradients are constants."""
    if torch.is_grad_enabled():
        raise StepError(
            f"{what} forms its gradients in the forward, and those have no derivative of "
            f"their own (create_graph=True asks for one). {instead}"
        )
