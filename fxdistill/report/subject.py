"""What a report is made from: a distiller's parts, and a way to capture a step of theirs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxdistill.compiler.backend import Recipe
from fxdistill.compiler.journal import Journal
from fxdistill.graph.halves import Halves
from fxdistill.graph.joint import JointProgram
from fxdistill.models.tap import Tower
from fxdistill.objective.call import Call
from fxdistill.objective.objective import Objective
from fxdistill.taps.table import TapTable

CapturedStep = tuple[JointProgram, Halves | None, TapTable]


@dataclass(frozen=True)
class Subject:
    """A distiller as a report sees it. Nothing of it is changed.

    ``models`` stand in the order in which they run; ``main`` is the one whose inputs say what the
    tokens are. ``sort`` sorts the arguments of a call, raising what a step would raise before it
    runs. ``capture(call, objective, recipe)`` captures a step and cuts it, without running it.
    ``notes`` and ``warnings`` are what is to be told whatever a capture shows.
    """

    models: Mapping[Tower, nn.Module]
    frozen: frozenset[Tower]
    main: Tower
    projections: nn.ModuleList
    objective: Objective
    settings: Mapping[str, float | Tensor]
    mode: str
    recipe: Recipe
    journal: Journal
    sort: Callable[[tuple[Any, ...], Mapping[str, Any]], Call]
    capture: Callable[[Call, Objective, Recipe], CapturedStep]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """Models and projections, the main model first: what they share is the first one's."""
        others = {name: model for name, model in self.models.items() if name != self.main}
        main = {self.main: self.models[self.main]}
        return {**main, **others, "projections": self.projections}

    @property
    def learning(self) -> tuple[str, ...]:
        """The names of what learns: models, the main one first, and projections."""
        return tuple(name for name in self.parts if name not in self.frozen)
