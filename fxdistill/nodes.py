"""Functions that stay one node in a captured graph."""

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
