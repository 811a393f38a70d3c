"""What a model has beside its parameters that a step may change, and how it is put back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxdistill.base.contents import parts, same
from fxdistill.base.tensors import is_lazy

_VALUES = (bool, int, float, complex, str, type(None))
_TABLES = (list, dict, set)
_OF_TORCH = frozenset(vars(nn.Module()))  # what every module has: its parts, hooks, mode


class Kept:
    """One model, as it is now: ``restore()`` makes it so again."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.parameters = [
            (f"{type(module).__name__}.{name}", p)
            for module in modules
            for name, p in module._parameters.items()
            if p is not None
        ]
        self._modules = [_Module(module) for module in modules]
        self._hooks = _hooks(modules)

    def restore(self) -> None:
        """Put everything back, by identity and by value.

        A model that has put hooks into itself keeps its flags and lists: they may say that the
        hooks are there, and it would put them in once more.
        """
        hooked = _hooks([one.module for one in self._modules]) != self._hooks
        for one in self._modules:
            one.restore(attributes=not hooked)


class _Module:
    """One module without its parts."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.training = module, module.training
        tensors = (*module._parameters.values(), *module._buffers.values())
        self.built = not any(map(is_lazy, tensors))  # a lazy layer is another one once it is
        self.buffers = dict(module._buffers)
        own = {k: v for k, v in vars(module).items() if k not in _OF_TORCH}
        self.tensors = {k: v for k, v in own.items() if isinstance(v, Tensor)}
        self.values = {k: v for k, v in own.items() if type(v) in _VALUES}
        self.tables = [(v, v.copy()) for v in own.values() if type(v) in _TABLES]
        made = (v for v in own.values() if isinstance(v, torch.Generator))
        self.generators = [(generator, generator.get_state()) for generator in made]
        held = [*self.buffers.values(), *self.tensors.values()]
        flat = [part for x in held if x is not None for part in parts(x)]
        self.contents = [(part, part.clone()) for part in flat]

    def restore(self, *, attributes: bool) -> None:
        if self.built:
            # Only what differs is set: dynamo's guards look at whether these tables were written.
            _restore(self.module._buffers, self.buffers, prune=True)
            _restore(vars(self.module), self.tensors)
        _restore(vars(self.module), {"training": self.training})
        if attributes and self.built:
            _restore(vars(self.module), self.values)
            for table, before in self.tables:
                _refill(table, before)
        for generator, state in self.generators:
            generator.set_state(state)
        with torch.no_grad():
            for part, before in self.contents:
                if not same(part, before):
                    part.copy_(before)


def _hooks(modules: list[nn.Module]) -> int:
    """How many hooks the modules have."""
    return sum(
        len(table)
        for module in modules
        for name, table in vars(module).items()
        if name in _OF_TORCH and name.endswith("hooks")
    )


def _restore(table: dict[str, Any], before: Mapping[str, Any], *, prune: bool = False) -> None:
    """Set in ``table`` what was there ``before``; with ``prune``, remove what is new."""
    for name, value in before.items():
        if table.get(name, table) is not value:
            table[name] = value
    if prune:
        for name in [name for name in table if name not in before]:
            del table[name]


def _refill(table: Any, before: Any) -> None:
    """Give a list, dict or set the members that it had, unless it has them."""
    now, then = _members(table), _members(before)
    if len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True)):
        return
    table.clear()
    if isinstance(table, list):
        table.extend(before)
    else:
        table.update(before)


def _members(table: Any) -> list[Any]:
    return [x for item in table.items() for x in item] if isinstance(table, dict) else [*table]
