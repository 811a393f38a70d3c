"""The models of a distiller by name, and how each is run.

A traced step meets them here, and not on the distiller: the step's graph then reads parameters of
models and projections, and nothing of the module that a user may wrap, rename or compile around.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxdistill import parallel
from fxdistill.base.tensors import is_placed
from fxdistill.models.tap import Tower
from fxdistill.objective.call import Inputs


@dataclass(frozen=True)
class Model:
    """A model in its place: whether it learns, and what makes its weights of a step on a mesh.

    ``sharding.gathered(module)`` gives the weights that stand in for parameters.
    """

    module: nn.Module
    trains: bool = True
    sharding: Any = None


class Towers:
    """All models, in the order in which they run, and the projections between them.

    Nothing is registered here: a frozen model has no place in ``parameters()``. ``main`` is the
    model whose inputs say what the tokens are, and which a loss without terms hangs on.
    """

    def __init__(
        self, models: Mapping[Tower, Model], projections: nn.ModuleList, main: Tower
    ) -> None:
        self.modules = {tower: model.module for tower, model in models.items()}
        self.frozen = frozenset(tower for tower, model in models.items() if not model.trains)
        self.shardings = {
            tower: model.sharding for tower, model in models.items() if model.sharding is not None
        }
        self.projections = projections
        self.main = main
        self._compared = False  # whether ranks were asked for their first losses

    @property
    def main_module(self) -> nn.Module:
        """The model called ``main``."""
        return self.modules[self.main]

    def trained(self) -> Iterable[nn.Module]:
        """The models that learn, the main one first."""
        others = (t for t in self.modules if t != self.main and t not in self.frozen)
        return [self.modules[tower] for tower in (self.main, *others)]

    def run(self, tower: Tower, inputs: Inputs) -> Any:
        """Call one model, on a mesh with the weights that a step uses."""
        model, sharding = self.modules[tower], self.shardings.get(tower)
        if sharding is None:
            return model(*inputs.args, **inputs.kwargs)
        if not torch.compiler.is_compiling():
            parallel.recompute.gather_again(model, sharding)
        weights = sharding.gathered(model)
        return torch.func.functional_call(model, weights, inputs.args, inputs.kwargs)

    def anchor(self) -> Tensor:
        """A parameter that gradients can reach, if there is one."""
        for module in (*self.trained(), self.projections):
            for parameter in module.parameters():
                if parameter.requires_grad:
                    return parameter
        return next(self.main_module.parameters())

    def dynamic(self, asked: bool | None) -> bool | None:
        """What to tell dynamo: in torch 2.13 sizes of DTensors in a graph cannot be symbolic.

        Parameters that are gathered before they are used leave none behind.
        """
        gathered = {sharding.leaves_dtensors for sharding in self.shardings.values()}
        if asked is not None or gathered == {False}:
            return asked
        return False if self._placed() else None

    def compare(self, terms: Mapping[str, Tensor]) -> None:
        """On a mesh, once: MeshError unless all ranks have the same terms."""
        if self._compared or not terms:
            return
        if self._placed():
            parallel.agree.require_alike(terms, self.modules.values())
        self._compared = True

    def _placed(self) -> bool:
        return any(is_placed(p) for model in self.modules.values() for p in model.parameters())
