"""Names for the models of a distiller, and for single values of a model."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Tower = str
"""The name of one of a distiller's models: ``"student"``, ``"teacher"``, or what it was called.

A tower is a model in its place in a distillation: its graph, its inputs and its values go by this
name.
"""
Section = str
"""A part of a step's graph: a tower, by its name, or ``"objective"``."""


ATTENTION = "attention"
"""The port of what a module attends with; behind a point, its parts."""


Reader = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Tensor]
"""A port that is computed: ``(module, args, kwargs, output) -> tensor``."""


def port_text(port: str | Reader) -> str:
    """What a port is called: itself, or the name of the function that computes it, and ``()``."""
    if isinstance(port, str):
        return port
    made_of: Any = port
    while isinstance(made_of, functools.partial):
        made_of = made_of.func
    return f"{getattr(made_of, '__name__', type(made_of).__name__)}()"


def module_names(module: nn.Module) -> list[str]:
    """The paths of all submodules of ``module``, in order: those that a mapping can name."""
    return [name for name, _ in module.named_modules(remove_duplicate=False) if name]


@dataclass(frozen=True, order=True)
class Tap:
    """One value of a model: a port of the ``call``-th call of the module at ``path``.

    ``reads`` computes the value of a port that is a function; ``port`` is then its name.
    """

    path: str
    port: str = "output"
    call: int = 0
    reads: Reader | None = field(default=None, compare=False, repr=False)
    # Text, formed here: dynamo makes numbers symbolic, and cannot format symbolic numbers.
    name: str = field(init=False, compare=False, repr=False, default="")
    call_text: str = field(init=False, compare=False, repr=False, default="")

    def __post_init__(self) -> None:
        """Set ``name``: ``path``, with ``@call`` and ``:port`` where they are not the default."""
        call = f"@{self.call}" if self.call else ""
        port = f":{self.port}" if self.port != "output" else ""
        object.__setattr__(self, "name", f"{self.path}{call}{port}")
        object.__setattr__(self, "call_text", str(self.call))

    def __str__(self) -> str:
        return self.name
