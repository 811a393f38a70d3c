"""Control how dynamo treats a function: as one graph node, or as a code object of its own."""

import itertools
import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def one_node(fn: F) -> F:
    """Make dynamo put a call of ``fn`` into its graph as one node, instead of tracing through it.

    ``fn`` must be a pure function of its arguments: dynamo runs it on fake tensors and adds no
    guards for its body. AOTAutograd traces through it later. This is the only place that uses
    ``allow_in_graph``.
    """
    marked: F = torch.compiler.allow_in_graph(fn)
    return marked


_serial = itertools.count()


def own_code(fn: F) -> F:
    """Copy ``fn`` with a code object and a name of its own.

    Dynamo stores and counts compiled versions by code object, and records dynamic sizes by the
    code's name. With code of its own, no distiller uses up the recompile limit of another or reads
    its dynamic sizes.
    """
    name = f"{fn.__name__}_{next(_serial)}"
    code = fn.__code__.replace(co_name=name)
    made: Any = types.FunctionType(code, fn.__globals__, name, fn.__defaults__, fn.__closure__)
    return made  # type: ignore[no-any-return]
