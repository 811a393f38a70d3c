"""Activation checkpoints of models on a mesh that run as they are.

A step puts gathered weights into a model for the time of its forward. What a checkpoint computes
again, it computes in the backward, when the parameters are back in their places: hooks on the
modules that have parameters gather them there once more, each for its own forward, and scatter
nothing. Gradients flow through the weights of the first forward; those of the second are only
read. So hooks stay on the model, and do nothing outside of a backward.

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
    """Put hooks on ``model``, unless it has them: checkpointed parts then run in a backward too."""
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
    """Swaps the weights of one module, by name."""

    def __init__(self, weights: Mapping[str, StepWeight], axes: Axes) -> None:
        self.weights, self.axes = weights, axes
        self.away: dict[str, nn.Parameter] = {}  # what has been taken out for a forward

    def put(self, module: nn.Module, args: Any) -> None:
        """Before the forward of ``module``: whole weights in place of its parameters.

        In a step's own forward what lies there is gathered already, and no parameter.
        """
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return
        for name, weight in self.weights.items():
            parameter = module._parameters[name]
            if isinstance(parameter, nn.Parameter):
                self.away[name] = parameter
                module._parameters[name] = self._again(parameter, weight)  # type: ignore[assignment]

    def take(self, module: nn.Module, args: Any, output: Any) -> None:
        """After it, also where a checkpoint has all it needs and leaves by an exception."""
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
