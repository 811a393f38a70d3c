"""Activation checkpoints of models on a mesh, outside of one graph.

A step puts gathered weights into a model for the time of its forward. A checkpoint recomputes in
the backward, when the sharded parameters are back in place. So hooks on the modules that have
parameters gather the weights again, each for the forward of its module, and scatter no gradients:
gradients flow through the weights of the first forward, and the second only reads its weights. The
hooks stay on the model, and do nothing outside of a backward.

Private to torch and used here only: ``_current_graph_task_id``. If it moves, checkpoints on a mesh
fail outside of one graph.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxdistill.errors import StepError
from fxdistill.parallel.sharding import Axes, Sharding, StepWeight, gathered_weight

_PREPARED = "_fxdistill_gathers_again"


def gather_again(model: nn.Module, sharding: Sharding) -> None:
    """Put hooks on ``model``, unless it has them, so that its checkpoints run in a backward."""
    if _PREPARED in vars(model):
        return
    named = {id(p): sharding.weights[name] for name, p in model.named_parameters()}
    for module in model.modules():
        own = {name: named[id(p)] for name, p in module._parameters.items() if p is not None}
        if own:
            hooks = _GatherAgain(own, sharding.axes)
            module.register_forward_pre_hook(hooks.put, prepend=True)
            module.register_forward_hook(hooks.take, always_call=True)
    vars(model)[_PREPARED] = True


class _GatherAgain:
    """Swap the parameters of one module for gathered weights while a checkpoint recomputes."""

    def __init__(self, weights: Mapping[str, StepWeight], axes: Axes) -> None:
        self.weights, self.axes = weights, axes
        self.away: dict[str, nn.Parameter] = {}  # parameters taken out for a forward

    def put(self, module: nn.Module, args: Any) -> None:
        """Replace the parameters of ``module`` by gathered weights, before its forward.

        In the forward of a step itself, the weights there are gathered already, and no parameters.
        """
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return
        for name, weight in self.weights.items():
            parameter = module._parameters[name]
            if isinstance(parameter, nn.Parameter):
                self.away[name] = parameter
                module._parameters[name] = self._again(parameter, weight)  # type: ignore[assignment]

    def take(self, module: nn.Module, args: Any, output: Any) -> None:
        """Restore the parameters after the forward, also if a checkpoint ends it early."""
        while self.away:
            name, parameter = self.away.popitem()
            module._parameters[name] = parameter

    def _again(self, parameter: nn.Parameter, weight: StepWeight) -> Tensor:
        with torch.no_grad():
            whole = gathered_weight(parameter, weight, self.axes).detach()
        if parameter.requires_grad:
            whole.requires_grad_().register_hook(_lost)
        return whole


def _lost(gradient: Tensor) -> None:
    raise StepError(
        "an activation checkpoint with use_reentrant=True learns from what it computes again, and "
        "weights on a mesh are only read there: use_reentrant=False."
    )
