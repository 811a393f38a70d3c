"""Models without weights: fake tensors replace their meta tensors for a while.

Operators on the meta device do not say where they would run: attention falls back to matrix
products that no real device computes. A fake tensor knows the device that it stands for.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from fxdistill.base.tensors import is_placed

STANDS_FOR = torch.device("cpu")


@contextlib.contextmanager
def standing_in(models: Iterable[nn.Module]) -> Iterator[FakeTensorMode | None]:
    """Replace the models' meta tensors by fake tensors within the context.

    Yields their fake tensor mode, or ``None`` if all tensors are real, and nothing is replaced.
    Models whose tensors are fake already keep their mode.
    """
    modules = {id(m): m for model in models for m in model.modules()}.values()
    held = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values())]
    fake = next((t for t in held if isinstance(t, FakeTensor)), None)
    if fake is None and not any(t is not None and t.is_meta for t in held):
        yield None
        return
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake is None else fake.fake_mode
    made: dict[int, Tensor] = {}
    put: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in modules:
            for table in _tables(module):
                for name, value in table.items():
                    if _is_empty(value):
                        put.append((table, name, value))
                        table[name] = made.setdefault(id(value), _stand_in(value, mode))
        with mode:
            yield mode
    finally:
        for table, name, value in put:
            table[name] = value


def _tables(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """A module's tables of parameters, buffers and plain attributes."""
    return module._parameters, module._buffers, vars(module)


def _is_empty(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta and not isinstance(value, FakeTensor)


def _stand_in(value: Tensor, mode: FakeTensorMode) -> Tensor:
    empty = _empty(value, mode)
    with mode:
        if isinstance(value, nn.Parameter):
            return nn.Parameter(empty, requires_grad=value.requires_grad)
        return empty


def _empty(value: Tensor, mode: FakeTensorMode) -> Tensor:
    device = STANDS_FOR if value.is_meta else value.device
    with mode:
        if is_placed(value):
            return torch.empty_like(value, device=device)
        # No empty_like: a fake tensor mode may refuse a tensor that is not fake.
        sizes = value.shape, value.stride()
        return torch.empty_strided(*sizes, dtype=value.dtype, device=device)


def faked(inputs: Any, mode: FakeTensorMode) -> Any:
    """``inputs`` as fake tensors of ``mode``."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        return _empty(value, mode).requires_grad_(value.requires_grad)

    return tree_map(one, inputs)
