"""Weights and temperature: tensors that enter the graph, so that a change recompiles nothing."""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from fxdistill.errors import (
    MatchWarning,
    OptionError,
)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise OptionError where a weight or the temperature is not one number."""
    for name, value in settings.items():
        single = isinstance(value, Tensor) and value.numel() == 1
        number = isinstance(value, (int, float)) and math.isfinite(value)
        if not single and not number:
            raise OptionError(f"{name}={value!r}: a finite number, or a tensor of one element")
        if name == "temperature" and number and value <= 0:
            raise OptionError(f"temperature={value!r}: it divides the logits and must be positive")


def warn_of_zero_weights(terms: Iterable[Any]) -> None:
    """Warn of matches that are computed and reach no loss."""
    for term in terms:
        if not isinstance(term.weight, Tensor) and term.weight == 0:
            warnings.warn(
                f"the match of student {term.name!r} has weight 0: it is computed and teaches "
                "nothing until distiller.set(weights={...}) raises it. Drop it if that is not "
                "meant.",
                MatchWarning,
                stacklevel=3,
            )
