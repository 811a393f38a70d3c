"""The distiller that a trainer trains."""

from typing import Any

from torch import nn

from fxdistill.distiller.distiller import Distiller
from fxdistill.errors import OptionError


def distiller_of(model: Any, who: str) -> Distiller:
    """``model``, or the distiller inside of a wrapper such as DDP; OptionError if there is none."""
    inside = model
    while not isinstance(inside, Distiller):
        within = getattr(inside, "module", getattr(inside, "_orig_mod", None))
        if not isinstance(within, nn.Module):
            raise OptionError(
                f"{who} is for a Trainer whose model is what fxdistill.wrap returns, and this one "
                f"trains a {type(model).__name__}: Trainer(model=distiller, ...)"
            )
        inside = within
    return inside
