"""Run a step and leave no trace of it: everything that it may change is put back."""

import contextlib
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxdistill.base.contents import mark, parts
from fxdistill.distiller.keep import Kept
from fxdistill.errors import StepError


@contextlib.contextmanager
def unchanged(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore the state of ``modules``, and of random numbers, after the body.

    That is gradients, buffers, modes, and what modules keep as attributes: tensors, numbers, flags,
    texts, lists, dicts, generators. Layers that the body builds (lazy ones) stay built, and hooks
    that a model puts into itself in its first run stay: the compiled step was made with them.

    Raises StepError where the body has written a parameter: a copy of all of them would cost as
    much memory as they do.
    """
    kept = [Kept(module) for module in modules]
    named = {p: name for one in kept for name, p in one.parameters}
    marks = {p: [mark(part) for part in parts(p)] for p in named}
    gradients = {p: p.grad for p in named}
    with _random_numbers({p.device for p in named}):
        for p in named:
            p.grad = None
        try:
            yield
        finally:
            for p, gradient in gradients.items():
                p.grad = gradient
            for one in kept:
                one.restore()
    written = sorted(name for p, name in named.items() if marks[p] and _written(p, marks[p]))
    if written:
        raise StepError(
            f"the step writes parameters in its forward ({', '.join(written)}), and that cannot be "
            "taken back: load the weights again, and call this after the first step of training"
        )


def _written(p: Tensor, before: list[tuple[int, Tensor] | None]) -> bool:
    for part, then in zip(parts(p), before, strict=True):
        now = mark(part)
        if then is not None and now is not None:
            moved = now[0] != then[0]
            if moved or not torch.equal(now[1], then[1]):
                return True
    return False


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
