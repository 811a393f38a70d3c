"""What ``torch.vmap`` and ``torch.func`` do to values and graphs.

Private to torch and used here only: functorch's levels, its wrappers, and where its functions are
defined. If they move, importing this fails, or models that use transforms do.
"""

from torch import Tensor, fx
from torch._C._functorch import (
    get_unwrapped,
    is_functorch_wrapped_tensor,
    maybe_current_level,
)

_STATE = ("torch._C._functorch", "torch._functorch")


def level() -> int:
    """How many transforms are being run within one another."""
    return maybe_current_level() or 0


def unwrapped(value: Tensor) -> Tensor:
    """What is inside of the wrappers of all transforms."""
    while is_functorch_wrapped_tensor(value):
        value = get_unwrapped(value)
    return value


def sets_level(node: fx.Node) -> bool:
    """Whether ``node`` enters or leaves a transform: it returns a level, and has no readers."""
    return str(getattr(node.target, "__module__", "")).startswith(_STATE)
