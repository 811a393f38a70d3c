"""What is saved for a backward, where a checkpoint runs around it."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch.autograd.graph import saved_tensors_hooks

R = TypeVar("R")


def apart(function: Callable[..., R]) -> Callable[..., R]:
    """Keep what ``function`` saves for its backward out of a checkpoint that runs around it.

    A checkpoint runs its body again in the backward, when hooks are gone, and would miss it.
    """

    @functools.wraps(function)
    def computed(*args: Any, **kwargs: Any) -> R:
        with saved_tensors_hooks(lambda x: x, lambda x: x):
            return function(*args, **kwargs)

    return computed
