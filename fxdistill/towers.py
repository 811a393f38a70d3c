"""The two models of a distiller, and how each is run."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fxdistill.call import Inputs


class Towers:
    """Holds the teacher without registering it, and what makes the weights of a step on a mesh.

    ``shardings`` by tower: ``gathered(model)`` gives the weights that stand in for parameters.
    """

    def __init__(self, teacher: nn.Module, shardings: Mapping[str, Any]) -> None:
        self.teacher = teacher
        self.shardings = shardings

    def run(self, tower: str, model: nn.Module, inputs: Inputs) -> Any:
        """Call ``model``."""
        sharding = self.shardings.get(tower)
        if sharding is None:
            return model(*inputs.args, **inputs.kwargs)
        weights = sharding.gathered(model)
        return torch.func.functional_call(model, weights, inputs.args, inputs.kwargs)
