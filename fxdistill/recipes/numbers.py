"""The check of the numbers that presets take."""

import math
from numbers import Real
from typing import Any

from fxdistill.errors import OptionError


def require(
    preset: str, name: str, value: Any, *, above: float | None = None, most: float = math.inf
) -> None:
    """Raise OptionError unless a weight is a finite number in its range."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    fits = number and math.isfinite(value) and value <= most
    if fits and (value >= 0 if above is None else value > above):
        return
    least = "0 or more" if above is None else f"above {above}"
    upper = "" if most == math.inf else f", {most} at most"
    raise OptionError(f"{preset}: {name}={value!r}: a number, {least}{upper}")
