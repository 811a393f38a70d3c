"""Recognise ``torch.vmap`` and ``torch.func`` in values and graphs.

Private to torch and used here only: functorch's levels, its wrappers, and the modules that define
its functions. If they move, importing this fails, or models that use transforms fail.
"""

from torch import Tensor, fx
from torch._C._functorch import (
    get_unwrapped,
    is_functorch_wrapped_tensor,
    maybe_current_level,
)

_STATE = ("torch._C._functorch", "torch._functorch")


def level() -> int:
    """How many nested transforms are running."""
    return maybe_current_level() or 0


def unwrapped(value: Tensor) -> Tensor:
    """The tensor inside the wrappers of all transforms."""
    while is_functorch_wrapped_tensor(value):
        value = get_unwrapped(value)
    return value


def is_of_functorch(node: fx.Node) -> bool:
    """Whether ``node`` calls functorch's machinery; one that returns no tensor sets its state."""
    return str(getattr(node.target, "__module__", "")).startswith(_STATE)


def steps_of(node: fx.Node) -> int:
    """1 if ``node`` enters a transform, -1 if it leaves one, else 0."""
    name = str(getattr(node.target, "__name__", ""))
    return name.endswith("increment_nesting") - name.endswith("decrement_nesting")
