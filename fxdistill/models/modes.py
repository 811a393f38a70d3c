"""Set train and eval mode for a step; restore modes and buffers after an error."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from fxdistill.errors import FxDistillError, ModeError


def settle_modes(learning: Iterable[nn.Module], frozen: nn.Module, name: str = "teacher") -> None:
    """Put a frozen model in eval mode, except modules that it shares with a model that learns.

    Raises ModeError if such a module is in train mode and computes something else in that mode.
    ``name`` is the name of the frozen model.
    """
    if not _any_training(frozen):  # as in every step but the first
        return
    shared = {id(m) for model in learning for m in model.modules()}
    for path, module in frozen.named_modules():
        if id(module) in shared and module.training and (reason := _mode_matters(module)):
            raise ModeError(
                f"{name} module {path or 'itself'!r} ({type(module).__name__}, {reason}) is the "
                f"student's module too: the student trains, the {name} must be in eval mode. Set "
                f"its probability to 0, keep the shared part in eval mode, or give the {name} a "
                "copy."
            )
    for module in frozen.modules():
        if id(module) not in shared and module.training:
            module.training = False


def _any_training(model: nn.Module) -> bool:
    """Whether a module in ``model`` is in train mode; each step asks, so it walks by hand."""
    if model.training:
        return True
    waiting = [model]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None:
                if child.training:
                    return True
                if child._modules:
                    waiting.append(child)
    return False


@contextlib.contextmanager
def modes_kept_on_error(*models: nn.Module) -> Iterator[None]:
    """Restore the train and eval modes of ``models`` if the body raises."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, training in modes:
            module.training = training
        raise


@contextlib.contextmanager
def buffers_kept_on_error(*models: nn.Module) -> Iterator[None]:
    """Restore buffers (running statistics) if the body raises an FxDistillError."""
    before = {b: b.detach().clone() for model in models for b in model.buffers()}
    try:
        yield
    except FxDistillError:
        with torch.no_grad():
            for buffer, value in before.items():
                buffer.copy_(value)
        raise


def _probabilities(module: nn.Module) -> dict[str, float]:
    """The probabilities with which ``module`` itself drops or jitters values in training."""
    if isinstance(module, _DropoutNd):
        return {"p": module.p}
    return {
        name: value
        for name, value in vars(module).items()
        if ("drop" in name or "jitter" in name) and isinstance(value, float)
    }


def drops(module: nn.Module) -> str | None:
    """The first drop or jitter probability of ``module`` above 0, as ``name=p``; else ``None``."""
    return next((f"{name}={p}" for name, p in _probabilities(module).items() if p > 0), None)


def _mode_matters(module: nn.Module) -> str | None:
    """Why ``module`` computes something else in train mode; ``None`` if it seems not to."""
    if isinstance(module, (_BatchNorm, _InstanceNorm)):
        return "batch statistics" if module.track_running_stats else None
    if isinstance(module, nn.RReLU):
        return "random slopes"
    if (dropped := drops(module)) is not None:
        return dropped
    # A leaf that reads its mode. If it has probabilities, all are 0 here, and the mode does not
    # matter.
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
    """The source of a function; empty if it cannot be read."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""
