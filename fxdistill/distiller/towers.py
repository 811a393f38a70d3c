"""The two models of a distiller, and how each is run."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxdistill import parallel
from fxdistill.base.tensors import is_placed
from fxdistill.objective.call import Inputs


class Towers:
    """Holds the teacher without registering it, and what makes the weights of a step on a mesh.

    ``shardings`` by tower: ``gathered(model)`` gives the weights that stand in for parameters.
    """

    def __init__(self, teacher: nn.Module, shardings: Mapping[str, Any]) -> None:
        self.teacher = teacher
        self.shardings = shardings
        self._compared = False  # whether ranks were asked for their first losses

    def run(self, tower: str, model: nn.Module, inputs: Inputs) -> Any:
        """Call ``model``."""
        sharding = self.shardings.get(tower)
        if sharding is None:
            return model(*inputs.args, **inputs.kwargs)
        if not torch.compiler.is_compiling():
            parallel.recompute.gather_again(model, sharding)
        weights = sharding.gathered(model)
        return torch.func.functional_call(model, weights, inputs.args, inputs.kwargs)

    def dynamic(self, student: nn.Module, asked: bool | None) -> bool | None:
        """What to tell dynamo: in torch 2.13 sizes of DTensors in a graph cannot be symbolic.

        Parameters that are gathered before they are used leave none behind.
        """
        gathered = {sharding.leaves_dtensors for sharding in self.shardings.values()}
        if asked is not None or gathered == {False}:
            return asked
        models = (student, self.teacher)
        placed = any(is_placed(p) for model in models for p in model.parameters())
        return False if placed else None

    def compare(self, terms: Mapping[str, Tensor], student: nn.Module) -> None:
        """On a mesh, once: MeshError unless all ranks have the same terms."""
        if self._compared or not terms:
            return
        models = (student, self.teacher)
        if any(is_placed(p) for model in models for p in model.parameters()):
            parallel.agree.require_alike(terms, models)
        self._compared = True
