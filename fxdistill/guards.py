"""What can be known before a step runs: devices, modes, trainable parameters."""

import contextlib
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from fxdistill.errors import (
    DeviceError,
    FrozenStudentError,
    FxDistillError,
    MatchWarning,
    ModeError,
    OptionError,
)


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter (or buffer); CPU for a model that has none."""
    first: Tensor | None = next(model.parameters(), None)
    if first is None:
        first = next(model.buffers(), None)
    return torch.device("cpu") if first is None else first.device


def check_devices(
    model: nn.Module, name: str, args: Iterable[Any], kwargs: Mapping[str, Any]
) -> None:
    """Raise DeviceError where an input is not where the model is (if that is one place)."""
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
    """Raise DeviceError where two models that are each in one place are not in the same."""
    places = [{p.device for p in model.parameters()} for model in (student, other)]
    if len(places[0]) == len(places[1]) == 1 and places[0] != places[1]:
        (s,), (t,) = places
        raise DeviceError(
            f"the student is on {s} and the {name} on {t}: their values cannot be compared. "
            f"distiller.to({str(s)!r}) moves all."
        )


def check_trainable(student: nn.Module) -> None:
    """Raise FrozenStudentError where there is nothing to train."""
    parameters = list(student.parameters())
    if not any(p.requires_grad for p in parameters):
        raise FrozenStudentError(
            f"none of the student's {len(parameters)} parameters requires a gradient: there is "
            "nothing to train. student.requires_grad_(True), or unfreeze the part to train."
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


def first_trainable(model: nn.Module) -> Tensor:
    """A parameter that gradients can reach."""
    return next((p for p in model.parameters() if p.requires_grad), next(model.parameters()))


def settle_modes(student: nn.Module, teacher: nn.Module) -> None:
    """Put the teacher in eval mode; modules that are the student's too keep the student's mode.

    Raises ModeError where that would change what the teacher computes.
    """
    shared = {id(m) for m in student.modules()}
    for name, module in teacher.named_modules():
        if id(module) in shared and module.training and (reason := _mode_matters(module)):
            raise ModeError(
                f"teacher module {name or 'itself'!r} ({type(module).__name__}, {reason}) is the "
                "student's module too: the student trains, the teacher must be in eval mode. Set "
                "its probability to 0, keep the shared part in eval mode, or give the teacher a "
                "copy."
            )
    for module in teacher.modules():
        if id(module) not in shared and module.training:
            module.training = False


@contextlib.contextmanager
def modes_kept_on_error(model: nn.Module) -> Iterator[None]:
    """Put the train and eval modes of ``model`` back if the body raises."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, training in modes:
            module.training = training
        raise


@contextlib.contextmanager
def buffers_kept_on_error(*models: nn.Module) -> Iterator[None]:
    """Put buffers (running statistics) back if the body raises an error of ours."""
    before = {b: b.detach().clone() for model in models for b in model.buffers()}
    try:
        yield
    except FxDistillError:
        with torch.no_grad():
            for buffer, value in before.items():
                buffer.copy_(value)
        raise


def _probabilities(module: nn.Module) -> dict[str, float]:
    """The probabilities with which ``module`` itself drops, or shakes, values in training."""
    if isinstance(module, _DropoutNd):
        return {"p": module.p}
    return {
        name: value
        for name, value in vars(module).items()
        if ("drop" in name or "jitter" in name) and isinstance(value, float)
    }


def drops(module: nn.Module) -> str | None:
    """Name and value of the probability of ``module`` that is not 0; ``None`` without one."""
    return next((f"{name}={p}" for name, p in _probabilities(module).items() if p > 0), None)


def _mode_matters(module: nn.Module) -> str | None:
    """Why ``module`` computes something else in train mode; ``None`` if it does not seem to."""
    if isinstance(module, (_BatchNorm, _InstanceNorm)):
        return "batch statistics" if module.track_running_stats else None
    if isinstance(module, nn.RReLU):
        return "random slopes"
    if (dropped := drops(module)) is not None:
        return dropped
    # A layer that asks for its mode, and has no probability that would say that it does not matter.
    leaf = next(module.children(), None) is None
    own = type(module).__module__.split(".")[0] != "torch"
    if (
        leaf
        and own
        and not _probabilities(module)
        and "self.training" in _source(type(module).forward)
    ):
        return "its forward asks for self.training"
    return None


@functools.cache
def _source(function: Callable[..., Any]) -> str:
    """The source of a function; empty where there is none to read."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""
