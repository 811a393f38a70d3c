"""The device of a model, and checks that inputs and other models are on it."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxdistill.errors import DeviceError


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter (or buffer); CPU for a model that has none."""
    first: Tensor | None = next(model.parameters(), None)
    if first is None:
        first = next(model.buffers(), None)
    return torch.device("cpu") if first is None else first.device


def check_devices(
    model: nn.Module, name: str, args: Iterable[Any], kwargs: Mapping[str, Any]
) -> None:
    """Raise DeviceError if an input is not on the device of the model (if it is on one only)."""
    device = device_of(model)
    named = {**{f"argument {i}": value for i, value in enumerate(args)}, **kwargs}
    wrong = {
        key: value.device
        for key, value in named.items()
        if isinstance(value, Tensor) and value.device != device
    }
    if wrong and len({p.device for p in model.parameters()}) == 1:
        places = ", ".join(f"{key} on {where}" for key, where in wrong.items())
        raise DeviceError(
            f"the {name} is on {device}, but {places}. Move the batch: x.to({str(device)!r})."
        )


def check_same_device(student: nn.Module, other: nn.Module, name: str) -> None:
    """Raise DeviceError if two models, each on one device, are not on the same one."""
    if device_of(student) == device_of(other):  # as in every ordinary step: walk no parameters
        return
    places = [{p.device for p in model.parameters()} for model in (student, other)]
    if len(places[0]) == len(places[1]) == 1 and places[0] != places[1]:
        (s,), (t,) = places
        raise DeviceError(
            f"the student is on {s} and the {name} on {t}: their values cannot be compared. "
            f"distiller.to({str(s)!r}) moves all."
        )
