"""Gradients that are formed in the forward: which are wanted, how they are scaled."""

import torch
from torch import Tensor

from fxdistill.base.tensors import wide
from fxdistill.errors import StepError


def require_indices(name: str, indices: Tensor | None, size: int) -> None:
    """Fail where an index is outside, without a check of the host: it waits for nothing."""
    if indices is not None:
        inside = (indices >= 0) & (indices < size)
        text = f"a {name} is outside of the student's vocabulary of {size}"
        torch._assert_async(inside.all(), text)


def scaled(gradient: Tensor, by: Tensor) -> Tensor:
    """The product, in float32 at least: the factor need not fit in half precision."""
    return (wide(gradient) * by).to(gradient.dtype)


def gradients_wanted(h: Tensor, w: Tensor, bias: Tensor | None) -> str:
    """Which gradients to form: of the hidden state, the weight and the bias, a letter each."""
    given = (("h", h), ("w", w), ("b", bias))
    grad = torch.is_grad_enabled()
    return "".join(n for n, x in given if grad and x is not None and x.requires_grad)


def require_first_order() -> None:
    """Raise in a backward that is to be differentiated: gradients of the forward are constants."""
    if torch.is_grad_enabled():
        raise StepError(
            "the fused head forms its gradients in the forward, and those have no derivative of "
            "their own (create_graph=True asks for one). wrap(..., compile={'fuse_head': False}), "
            "or the divergence and cross entropy of logits, have."
        )
