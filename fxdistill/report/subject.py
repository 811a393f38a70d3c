"""The subject of a report: a distiller's parts, and a way to capture its step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxdistill.compiler.backend import Recipe
from fxdistill.compiler.journal import Journal
from fxdistill.graph.halves import Halves
from fxdistill.graph.joint import JointProgram
from fxdistill.graph.sections import HEADS, LOSS_MODULES, PROJECTIONS
from fxdistill.models.tap import Tower
from fxdistill.objective.call import Call
from fxdistill.objective.objective import Objective
from fxdistill.taps.table import TapTable

CapturedStep = tuple[JointProgram, Halves | None, TapTable]


@dataclass(frozen=True)
class Subject:
    """A distiller as a report sees it. A report changes nothing in it.

    ``models`` are in the order in which they run; the inputs of ``main`` say which tokens there
    are. ``sort`` sorts the arguments of a call, and raises for wrong ones as a step would; it also
    returns the subject anew, with what these arguments tell (which values have tokens).
    ``capture(call, objective, recipe)`` captures a step and partitions it into forward and
    backward, without running it. Every report shows ``notes`` and ``warnings``, even if the capture
    fails.
    """

    models: Mapping[Tower, nn.Module]
    frozen: frozenset[Tower]
    main: Tower
    projections: nn.ModuleList
    losses: nn.ModuleList
    heads: nn.ModuleDict
    objective: Objective
    settings: Mapping[str, float | Tensor]
    mode: str
    recipe: Recipe
    journal: Journal
    sort: Callable[[tuple[Any, ...], Mapping[str, Any]], tuple[Call, "Subject"]]
    capture: Callable[[Call, Objective, Recipe], CapturedStep]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """The models, the main first, then what is beside them; the first owns what they share."""
        others = {name: model for name, model in self.models.items() if name != self.main}
        main = {self.main: self.models[self.main]}
        beside = {PROJECTIONS: self.projections, LOSS_MODULES: self.losses, HEADS: self.heads}
        return {**main, **others, **beside}

    @property
    def teachers(self) -> frozenset[Tower]:
        """The models that terms compare with and that no term makes learn: frozen or not."""
        objective = self.objective
        students = {term.of[0] for term in objective.features}
        students |= {term.student for term in objective.logits}
        students |= {term.student for term in objective.labels}
        students |= {head.student for head in objective.heads}
        return frozenset(self.models) - students - {self.main}

    @property
    def learning(self) -> tuple[str, ...]:
        """The names of the parts that learn: models, the main one first, and those beside them."""
        return tuple(name for name in self.parts if name not in self.frozen)
