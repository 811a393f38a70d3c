"""Look at one model on fake inputs, before there is a distiller: for what presets ask of it."""

from collections.abc import Iterable

import torch
from torch import nn

from fxdistill.distiller import channels, dry
from fxdistill.distiller.channels import Axes
from fxdistill.distiller.modes import Request, Steps
from fxdistill.distiller.towers import Model, Towers
from fxdistill.models.tap import Tap
from fxdistill.objective.beside import Beside
from fxdistill.objective.call import Inputs, sort_call
from fxdistill.objective.objective import Objective
from fxdistill.objective.term import HeadTerm


def axes_of(model: nn.Module, paths: Iterable[str], inputs: Inputs) -> dict[str, Axes]:
    """The axes of what modules return in a call with such inputs, as far as they can be told."""
    request = _reading(model, paths, inputs)
    if dry.is_fake(request):
        return {}
    return {tap.path: axes for tap, axes in channels.seen(request, Steps()).items()}


def calls_of(model: nn.Module, paths: Iterable[str], inputs: Inputs) -> list[Tap] | None:
    """All calls of modules in their order; ``None`` where the model does not run on such inputs."""
    request = _reading(model, paths, inputs)
    if dry.is_fake(request):
        return None
    values, error = dry.values_until_error(request, Steps())
    return None if error is not None else [tap for _, tap in values if tap.path]


def _reading(model: nn.Module, paths: Iterable[str], inputs: Inputs) -> Request:
    """A step of the model alone that reads what the modules return."""
    heads = tuple(HeadTerm(path, Tap(path), pools=True) for path in paths)
    towers = Towers({"student": Model(model)}, Beside.nothing(), "student")
    call = sort_call(towers.modules, towers.main, None, *inputs)
    return Request(towers, Objective(heads=heads), call, torch.zeros(()))
