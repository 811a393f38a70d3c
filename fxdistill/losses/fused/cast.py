"""The operands of a head, cast as a linear layer casts them under autocast."""

import torch

from fxdistill.base.autocast import autocast_dtype
from fxdistill.errors import OptionError
from fxdistill.losses.fused.call import HeadSide


def cast_side(side: HeadSide) -> HeadSide:
    """Cast operands as a linear layer does under autocast."""
    hidden, weight, bias = side
    dtype = autocast_dtype(hidden.device.type)
    if dtype is not None and hidden.dtype != torch.float64:
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
