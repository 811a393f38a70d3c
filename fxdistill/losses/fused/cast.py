"""The operands of a head, cast as a linear layer casts them under autocast."""

import torch

from fxdistill.errors import OptionError
from fxdistill.losses.fused.call import HeadSide


def cast_side(side: HeadSide) -> HeadSide:
    """Cast operands as a linear layer does under autocast."""
    hidden, weight, bias = side
    kind = hidden.device.type
    # Some devices, "meta" among them, have no autocast, and is_autocast_enabled raises for them.
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        if hidden.dtype != torch.float64:
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
    return HeadSide(hidden, weight, bias)


def cast_learning(side: HeadSide) -> HeadSide:
    """Cast the operands of the student; OptionError in float16. A teacher may have that."""
    side = cast_side(side)
    if side.hidden.dtype == torch.float16:
        raise OptionError(
            "the fused head forms gradients before a loss scale could be applied, and in float16 "
            "they would vanish: use bfloat16 or float32, or losses of logits"
        )
    return side
