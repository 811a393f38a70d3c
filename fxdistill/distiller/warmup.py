"""Compile ahead of training: a step runs, forward and backward, and what it changed goes back.

A compiled step comes into being by being called, and its backward by being differentiated. So
warming up is a real step, on a state that is remembered before it and restored after it, whether it
succeeds or not.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fxdistill.distiller.unchanged import unchanged


def warm_up(run: Callable[[], Tensor], modules: Sequence[nn.Module]) -> None:
    """Call ``run``, which returns a loss, and differentiate it; ``modules`` stay as they are."""
    learning = dict.fromkeys(p for m in modules for p in m.parameters() if p.requires_grad)
    with unchanged(modules):
        loss = run()
        if loss.requires_grad:
            # Not backward(): it would add to gradients, and call the hooks of those who wait.
            torch.autograd.grad(loss, tuple(learning), allow_unused=True)
