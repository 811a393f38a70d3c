"""Operators that form their gradient in the forward: what they would keep for a backward is gone.

Such an operator is one opaque node of a graph: dynamo does not unroll its loop, and Inductor does
not fuse across its blocks. It takes the values that may learn first and ``needs`` last, the letters
of the gradients that are wanted ("s" and "t" for student and teacher), and returns its value and
a gradient for each letter (empty where it is not wanted). The backward scales these.
"""

from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from fxdistill.base.tensors import wide
from fxdistill.losses.fused.gradients import require_first_order, scaled

Formed = tuple[Tensor, Tensor, Tensor]  # the value, and the gradients by student and teacher


def needed(*values: Tensor, letters: str = "st") -> str:
    """The letters of the gradients that autograd will ask for."""
    if not torch.is_grad_enabled():
        return ""
    return "".join(n for n, x in zip(letters, values, strict=True) if x.requires_grad)


def keeps_its_gradients(operator: CustomOpDef, name: str, letters: str = "st") -> CustomOpDef:
    """Register the shapes and the backward of such an operator; ``name`` is for messages."""

    def fake(*args: Any) -> tuple[Tensor, ...]:
        learning = zip(letters, args[: len(letters)], strict=True)
        gradients = [x.new_empty(x.shape if letter in args[-1] else (0,)) for letter, x in learning]
        return wide(args[0].new_empty(())), *gradients

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.needs, ctx.count = inputs[-1], len(inputs)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])

    def scale(ctx: Any, by_value: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        require_first_order(name, "It forms its gradient in the forward.")
        found: list[Tensor | None] = [None] * ctx.count
        for i, letter in enumerate(letters):
            if letter in ctx.needs and by_value is not None:
                found[i] = scaled(ctx.saved_tensors[i], by_value)
        return tuple(found)

    operator.register_fake(fake)
    operator.register_autograd(scale, setup_context=keep)
    return operator
