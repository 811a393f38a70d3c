"""Run a step and leave no trace of it: random states, buffers and modes are as they were.

Gradients are left alone by ``torch.autograd.grad``, which adds to none.
"""

import contextlib
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fxdistill.distiller.towers import Towers
from fxdistill.errors import OptionError


@contextlib.contextmanager
def traceless(towers: Towers) -> Iterator[None]:
    """Restore what a step may change in the models, beside them, and in random generators."""
    modules = [m for model in (*towers.modules.values(), *towers.beside) for m in model.modules()]
    modes = [(module, module.training) for module in modules]
    buffers = [(module._buffers, dict(module._buffers)) for module in modules]
    values = {b: b.detach().clone() for _, own in buffers for b in own.values() if b is not None}
    numpy = sys.modules.get("numpy")
    python, of_numpy = random.getstate(), numpy.random.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng(devices=_cuda_devices(modules)):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)
        for module, training in modes:
            module.training = training
        for table, own in buffers:
            if table != own:
                table.clear()
                table.update(own)
        with torch.no_grad():
            for buffer, value in values.items():
                buffer.copy_(value)


def _cuda_devices(modules: Iterable[nn.Module]) -> list[torch.device]:
    found = {p.device for module in modules for p in module.parameters(recurse=False)}
    return [device for device in found if device.type == "cuda"]


def inputs_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as the arguments of a call: keywords of a dict, or a tuple of positional ones."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple):
        return batch, {}
    raise OptionError(
        f"batch is a {type(batch).__name__}: a dict of the keywords of a call, or a tuple of its "
        "positional arguments"
    )
