"""The models of a distiller by name, and how each of them runs.

A traced step reads the models from here and not from the distiller. So its graph depends on the
parameters of models and of what is beside them, and not on the distiller, which a user may wrap,
rename or compile around.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxdistill import parallel
from fxdistill.base.tensors import is_placed
from fxdistill.errors import MeshError
from fxdistill.models.tap import Tower
from fxdistill.objective.beside import Beside
from fxdistill.objective.call import Inputs


@dataclass(frozen=True)
class Model:
    """A model of a distiller: whether it learns, and its sharding on a mesh.

    ``sharding.gathered(module)`` returns the weights that replace the parameters in a step.
    """

    module: nn.Module
    trains: bool = True
    sharding: Any = None


class Towers:
    """All models, in the order in which they run, and the modules that are trained beside them.

    This is not a module, because ``parameters()`` must not contain a frozen model. ``main`` is the
    model whose inputs say which tokens there are, and whose parameters give a loss without terms
    its (zero) gradient.
    """

    def __init__(self, models: Mapping[Tower, Model], beside: Beside, main: Tower) -> None:
        self.modules = {tower: model.module for tower, model in models.items()}
        self.frozen = frozenset(tower for tower, model in models.items() if not model.trains)
        self.shardings = {
            tower: model.sharding for tower, model in models.items() if model.sharding is not None
        }
        self.beside = beside
        self.main = main
        self._compared = False  # whether the ranks have compared their first losses

    @property
    def main_module(self) -> nn.Module:
        """The model called ``main``."""
        return self.modules[self.main]

    @property
    def every(self) -> tuple[nn.Module, ...]:
        """All models, and what is beside them."""
        return (*self.modules.values(), *self.beside)

    def trained(self) -> Iterable[nn.Module]:
        """The models that learn, the main one first."""
        others = (t for t in self.modules if t != self.main and t not in self.frozen)
        return [self.modules[tower] for tower in (self.main, *others)]

    def run(self, tower: Tower, inputs: Inputs) -> Any:
        """Call one model; on a mesh, with the weights that its sharding gathers."""
        model, sharding = self.modules[tower], self.shardings.get(tower)
        if sharding is None:
            return model(*inputs.args, **inputs.kwargs)
        if not torch.compiler.is_compiling():
            parallel.recompute.gather_again(model, sharding)
        weights = sharding.gathered(model)
        return torch.func.functional_call(model, weights, inputs.args, inputs.kwargs)

    def gathered(self, tower: Tower) -> Mapping[str, Tensor] | None:
        """The plain weights of a model whose parameters lie on a mesh; ``None`` without one.

        Raises MeshError where they are sharded within layers: its outputs are DTensors then.
        """
        sharding = self.shardings.get(tower)
        if sharding is not None and sharding.leaves_dtensors:
            raise MeshError(
                f"the {tower} is tensor parallel by wrap(mesh=...): it gives DTensors, and runs in "
                "steps of the distiller alone"
            )
        return None if sharding is None else dict(sharding.gathered(self.modules[tower]))

    def anchor(self) -> Tensor:
        """A trainable parameter, the main model's if it has one; without any, its first."""
        for module in (*self.trained(), *self.beside):
            for parameter in module.parameters():
                if parameter.requires_grad:
                    return parameter
        return next(self.main_module.parameters())

    def dynamic(self, asked: bool | None) -> bool | None:
        """The ``dynamic`` option for dynamo: ``asked``, or ``False`` for a graph with DTensors.

        In torch 2.13 their sizes cannot be symbolic. Parameters that are gathered before use leave
        no DTensors in the graph.
        """
        gathered = {sharding.leaves_dtensors for sharding in self.shardings.values()}
        if asked is not None or gathered == {False}:
            return asked
        return False if self._placed() else None

    def compare(self, terms: Mapping[str, Tensor]) -> None:
        """Compare the first step's terms across ranks; raises MeshError if they differ."""
        if self._compared or not terms:
            return
        if self._placed():
            parallel.agree.require_alike(terms, self.modules.values())
        self._compared = True

    def _placed(self) -> bool:
        return any(is_placed(p) for model in self.modules.values() for p in model.parameters())
