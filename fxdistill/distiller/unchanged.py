"""Run a step and leave no trace of it: everything that it may change is put back."""

import contextlib
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxdistill.errors import StepError


@contextlib.contextmanager
def unchanged(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore the state of ``modules``, and of random numbers, after the body.

    That is gradients, buffers, tensors and counts that modules keep as attributes, and modes. Hooks
    that a model puts into itself in its first run stay: the compiled step was made with them.

    Raises StepError where the body has written a parameter: a copy of all of them would cost as
    much memory as they do.
    """
    every = list(dict.fromkeys(m for module in modules for m in module.modules()))
    kept = [_Kept(module) for module in every]
    params = {p: (name, p._version) for module in every for name, p in _own_parameters(module)}
    gradients = {p: p.grad for p in params}
    devices = {p.device for p in params}
    with _random_numbers(devices):
        for p in params:
            p.grad = None
        try:
            yield
        finally:
            for p, gradient in gradients.items():
                p.grad = gradient
            for one in kept:
                one.restore()
    written = sorted(name for p, (name, version) in params.items() if p._version != version)
    if written:
        raise StepError(
            f"the step writes parameters in its forward ({', '.join(written)}), and warmup cannot "
            "take that back: load the weights again, and train without warmup"
        )


def _own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    kind = type(module).__name__
    return [(f"{kind}.{name}", p) for name, p in module._parameters.items() if p is not None]


class _Kept:
    """What one module has that a step may change."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.training = module, module.training
        self.buffers = dict(module._buffers)
        own = vars(module).items()
        self.counts = {k: v for k, v in own if type(v) in (int, float)}
        self.tensors = {k: v for k, v in own if isinstance(v, Tensor)}
        tensors = [x for x in (*self.buffers.values(), *self.tensors.values()) if x is not None]
        self.values = [(x, x._version, x.detach().clone()) for x in tensors if not x.is_meta]

    def restore(self) -> None:
        """Put everything back, by identity and by value."""
        # Only what differs is set: dynamo's guards look at whether these tables were written.
        _restore(self.module._buffers, self.buffers, prune=True)
        _restore(vars(self.module), {**self.counts, **self.tensors, "training": self.training})
        with torch.no_grad():
            for tensor, version, value in self.values:
                if tensor._version != version:
                    tensor.copy_(value)


def _restore(table: dict[str, Any], before: Mapping[str, Any], *, prune: bool = False) -> None:
    """Set in ``table`` what was there ``before``; with ``prune``, remove what is new."""
    for name, value in before.items():
        if table.get(name, table) is not value:
            table[name] = value
    if prune:
        for name in [name for name in table if name not in before]:
            del table[name]


@contextlib.contextmanager
def _random_numbers(devices: Iterable[torch.device]) -> Iterator[None]:
    """Restore all generators: Python's, numpy's if it is there, torch's on these devices."""
    numpy: Any = sys.modules.get("numpy")
    python, arrays = random.getstate(), numpy.random.get_state() if numpy is not None else None
    by_kind: dict[str, list[torch.device]] = {}
    for device in devices:
        if device.type not in ("cpu", "meta"):
            by_kind.setdefault(device.type, []).append(device)
    with contextlib.ExitStack() as forks:
        forks.enter_context(torch.random.fork_rng(devices=[]))
        for kind, some in by_kind.items():
            forks.enter_context(torch.random.fork_rng(devices=some, device_type=kind))
        try:
            yield
        finally:
            random.setstate(python)
            if arrays is not None:
                numpy.random.set_state(arrays)
