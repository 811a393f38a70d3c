"""The sizes that a model has fixed, with which the length of a text may agree by chance."""

import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from fxdistill.models.adapters import plain


def fixed_sizes(models: Iterable[nn.Module]) -> frozenset[int]:
    """All whole numbers that ``models`` hold.

    They are the sizes of parameters and buffers, whole numbers in attributes and configs, and
    constants of the models' own code. A value whose length does not come from the inputs, such as
    that of latent vectors or of channels, has one of these as a rule.
    """
    return frozenset(size for model in models for size in _of(model))


def _of(model: nn.Module) -> Iterator[int]:
    configs: dict[int, Any] = {}
    kinds: set[type] = set()
    for module in map(plain, model.modules()):
        kinds.add(type(module))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            yield from () if tensor is None else map(int, tensor.shape)
        for name, value in vars(module).items():
            if hasattr(value, "to_dict"):  # a config, which many modules share
                configs[id(value)] = value
            elif not name.startswith("_"):
                yield from _whole(value)
    for config in configs.values():
        yield from _whole(vars(config))
    read: set[types.CodeType] = set()
    for kind in kinds:
        for cls in kind.__mro__:
            if not cls.__module__.startswith(("torch.", "builtins")):
                for method in vars(cls).values():
                    yield from _constants(method, read)


def _constants(function: Any, read: set[types.CodeType]) -> Iterator[int]:
    """The whole numbers in the code of a function, and of those of its file that it names."""
    code = getattr(function, "__code__", None)
    if not isinstance(function, types.FunctionType) or code in read:
        return
    read.add(function.__code__)
    waiting = [function.__code__]
    while waiting:
        inside = waiting.pop()
        for value in inside.co_consts:
            if isinstance(value, types.CodeType):
                waiting.append(value)
            else:
                yield from _whole(value)
        for name in inside.co_names:
            found = function.__globals__.get(name)
            if getattr(found, "__module__", None) == function.__module__:
                yield from _constants(found, read)


def _whole(value: Any) -> Iterator[int]:
    """The whole numbers in a value, and in its parts."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _whole(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _whole(part)
    elif hasattr(value, "to_dict"):  # the config of a part
        yield from _whole(vars(value))
