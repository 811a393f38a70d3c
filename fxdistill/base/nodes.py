"""Functions as dynamo takes them: as one node of a graph, or as code of their own."""

import itertools
import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def one_node(fn: F) -> F:
    """Let dynamo put a call of ``fn`` into its graph as it is, instead of tracing through it.

    For pure functions of their arguments only: dynamo runs them on fake tensors and guards on
    nothing inside; AOTAutograd traces through them later. If ``allow_in_graph`` goes away, this is
    the one place that uses it.
    """
    marked: F = torch.compiler.allow_in_graph(fn)
    return marked


_serial = itertools.count()


def own_code(fn: F) -> F:
    """Copy ``fn`` with a code object and a name of its own.

    Dynamo keeps compiled versions, and their number, by code object, and what it has learnt about
    dynamic sizes by the code's name: distillers must not use up or misread each other's.
    """
    name = f"{fn.__name__}_{next(_serial)}"
    code = fn.__code__.replace(co_name=name)
    made: Any = types.FunctionType(code, fn.__globals__, name, fn.__defaults__, fn.__closure__)
    return made  # type: ignore[no-any-return]
