"""A part of a graph that forms its gradient in the forward, and keeps nothing else.

The part computes one number from values that learn and from constants. Its gradients are formed
while these values are at hand, in their dtypes; the backward multiplies them by what comes in. What
the part keeps for the backward is then not its intermediate values, nor the constants.
"""

from typing import Any

import torch
from torch import Tensor, fx

from fxdistill.losses.fused.gradients import require_first_order, scaled

_INSTEAD = (
    "wrap(..., compile=False) has one, and so has compile={'backend': 'eager', 'disable': "
    "('FormGradients',)}; graphs of AOTAutograd have none of any loss."
)


def formed(part: fx.GraphModule, learnt: int, *inputs: Any) -> Tensor:
    """The value of ``part``, whose first ``learnt`` inputs learn; all others are constants."""
    value: Tensor = _Formed.apply(part, learnt, *inputs)  # type: ignore[no-untyped-call]
    return value


class _Formed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: fx.GraphModule, learnt: int, *inputs: Any) -> Tensor:
        leaves = [x.detach().requires_grad_() for x in inputs[:learnt]]
        with torch.enable_grad():
            # An interpreter names the module that each operator belongs to.
            value: Tensor = fx.Interpreter(part).run(*leaves, *inputs[learnt:])
            # Made of no value, so that gradients do not wait for its sum over ranks.
            one = torch.ones(value.shape, dtype=value.dtype, device=value.device)
            gradients = torch.autograd.grad(value, leaves, one, allow_unused=True)
        ctx.missing = [gradient is None for gradient in gradients]
        ctx.constants = len(inputs) - learnt
        ctx.save_for_backward(*(g for g in gradients if g is not None))
        return value.detach()

    @staticmethod
    def backward(ctx: Any, by_value: Tensor) -> tuple[Tensor | None, ...]:
        require_first_order("a feature loss", _INSTEAD)
        saved = iter(ctx.saved_tensors)
        found = [None if missing else scaled(next(saved), by_value) for missing in ctx.missing]
        return (None, None, *found, *[None] * ctx.constants)
