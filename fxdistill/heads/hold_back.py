"""Heads that may return stand-ins for their logits, and the hooks that wrappers put on logits.

A wrapper that shards a model (FSDP2) gathers weights before a module's forward, and again before
its backward: it registers a hook on those outputs of the module that require gradients. A stand-in
is not part of autograd's graph. Only the losses take gradients from it, so registering the hook on
their total is as good.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

Hook = Callable[[Tensor], Tensor | None]


class StandIn(Protocol):
    """Logits that may be materialised later."""

    materialised: Tensor | None


class DeferrableHead(NamedTuple):
    """A linear layer that may return stand-ins, and how a wrapper that shards it behaves.

    ``gathered``: the wrapper gathers the weights for each forward. ``freed()`` tells whether it
    frees them after the forward. ``awaits(hook)`` tells whether a hook on logits is the wrapper's,
    which must run before the backward of the module that returns them.
    """

    module: nn.Linear
    gathered: bool = False
    freed: Callable[[], bool] = lambda: False
    awaits: Callable[[Any], bool] = lambda hook: False


class Waiting:
    """The wrappers' hooks that must run before the backward of the logits, so of the losses."""

    def __init__(self) -> None:
        self._hooks: list[tuple[StandIn, Hook]] = []

    def add(self, logits: StandIn, hook: Hook) -> None:
        """Remember ``hook``, which a wrapper registered on ``logits``."""
        self._hooks.append((logits, hook))

    def hand_to(self, total: Tensor) -> None:
        """Register the hooks on the loss, those of outer modules first.

        The backward reaches the loss before anything else. Logits that were materialised after all
        carry their hooks themselves.
        """
        for logits, hook in reversed(self._hooks):
            if logits.materialised is None and total.requires_grad:
                total.register_hook(hook)

    def move(self, logits: StandIn) -> None:
        """Register the hooks of ``logits``, which have just been materialised, on the result."""
        for waiting, hook in self._hooks:
            if waiting is logits and logits.materialised is not None:
                logits.materialised.register_hook(hook)
