"""Heads that may hand on stand-ins, and what waits for their logits' backward.

A wrapper that shards a model (FSDP2) gathers weights before a module runs, and before the backward
of what the module returned: it puts a hook on the outputs that learn. A stand-in is no node of
autograd's graph. All that learns from it are the losses, so that the hook is right on their total.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

Hook = Callable[[Tensor], Tensor | None]


class StandIn(Protocol):
    """Logits that may be made."""

    materialised: Tensor | None


class DeferrableHead(NamedTuple):
    """A linear layer that may hand on stand-ins, and what a wrapper that shards it does about it.

    ``gathered``: the wrapper gathers its weights for each forward. ``freed``: whether it frees them
    after the forward. ``awaits``: whether a hook that is put on logits is the wrapper's, to be run
    before the backward of the module that returns them.
    """

    module: nn.Linear
    gathered: bool = False
    freed: Callable[[], bool] = lambda: False
    awaits: Callable[[Any], bool] = lambda hook: False


class Waiting:
    """Hooks of wrappers that are to run before the backward of logits, and so of the losses."""

    def __init__(self) -> None:
        self._hooks: list[tuple[StandIn, Hook]] = []

    def add(self, logits: StandIn, hook: Hook) -> None:
        """Remember ``hook``, which was put on ``logits``."""
        self._hooks.append((logits, hook))

    def hand_to(self, total: Tensor) -> None:
        """Put them on the loss, outer modules first: it has its gradient before all else has.

        Those of logits that were made after all are on these.
        """
        for logits, hook in reversed(self._hooks):
            if logits.materialised is None and total.requires_grad:
                total.register_hook(hook)

    def move(self, logits: StandIn) -> None:
        """Put those of ``logits``, which are made now, on what was made."""
        for waiting, hook in self._hooks:
            if waiting is logits and logits.materialised is not None:
                logits.materialised.register_hook(hook)
