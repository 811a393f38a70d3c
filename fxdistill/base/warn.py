"""Warnings that name the line of the user's code that led to them."""

import sys
import warnings
from types import FrameType

# What stands between a user's line and ours: torch (modules call ``forward``, dynamo calls what it
# does not trace), decorators of the standard library, and loops that call a distiller.
_BETWEEN = frozenset(("fxdistill", "torch", "contextlib", "functools"))
_LOOPS = frozenset(("accelerate", "lightning", "pytorch_lightning", "transformers", "trl"))


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Give a warning at the nearest line on the stack that is the user's own."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and _top(frame) in _BETWEEN | _LOOPS:
        frame, level = frame.f_back, level + 1
    # Where no line is the user's (in a thread of torch's own), the caller of this has to do.
    warnings.warn(text, category, stacklevel=2 if frame is None else level)


def _top(frame: FrameType) -> str:
    """The package that the code of a frame is of."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
