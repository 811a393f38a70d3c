"""Whether what a user gives as a model is one."""

from typing import Any

from torch import nn

from fxdistill.errors import OptionError


def check_models(**models: Any) -> None:
    """Raise OptionError where a model is none."""
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise OptionError(
                f"{name} is a {type(model).__name__}{_shown(model)}, and an nn.Module is needed: a "
                "model that from_pretrained(...) or a constructor of yours has made"
            )


def _shown(value: Any) -> str:
    return f" {value!r}" if isinstance(value, str) else ""
