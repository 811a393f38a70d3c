"""Operators that form their gradient in the forward: what they would keep for a backward is gone.

Such an operator is one opaque node of a graph: dynamo does not unroll its loop, and Inductor does
not fuse across its blocks. It takes ``student`` and ``teacher`` first and ``needs`` last, the
letters of the gradients that are wanted ("s", "t"), and returns its value and both gradients (empty
where they are not wanted). The backward scales these.
"""

from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from fxdistill.losses.fused.gradients import require_first_order, scaled

Formed = tuple[Tensor, Tensor, Tensor]  # the value, and the gradients by student and teacher


def needed(student: Tensor, teacher: Tensor) -> str:
    """The letters of the gradients that autograd will ask for."""
    if not torch.is_grad_enabled():
        return ""
    return "s" * student.requires_grad + "t" * teacher.requires_grad


def keeps_its_gradients(operator: CustomOpDef, name: str) -> CustomOpDef:
    """Register the shapes and the backward of such an operator; ``name`` is for messages."""

    def fake(student: Tensor, teacher: Tensor, *rest: Any) -> Formed:
        pairs = zip("st", (student, teacher), strict=True)
        gradients = [x.new_empty(x.shape if letter in rest[-1] else (0,)) for letter, x in pairs]
        return student.new_empty(()), gradients[0], gradients[1]

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Formed) -> None:
        ctx.needs, ctx.count = inputs[-1], len(inputs)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])

    def scale(ctx: Any, by_value: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        require_first_order(name, "It forms its gradient in the forward.")
        found: list[Tensor | None] = [None] * ctx.count
        for i, letter in enumerate("st"):
            if letter in ctx.needs and by_value is not None:
                found[i] = scaled(ctx.saved_tensors[i], by_value)
        return tuple(found)

    operator.register_fake(fake)
    operator.register_autograd(scale, setup_context=keep)
    return operator
