"""The three ways in which a distiller runs a step: one graph, regional, eager."""

from typing import TYPE_CHECKING

from torch import Tensor

from fxdistill.distiller.step import lookup_marker
from fxdistill.heads.curve import logits_from
from fxdistill.heads.unmade import Parts, handed_on
from fxdistill.models.tap import Tap
from fxdistill.objective.objective import Losses, Objective
from fxdistill.objective.term import LOGITS
from fxdistill.objective.tokens import Batch
from fxdistill.taps.markers import verified

if TYPE_CHECKING:
    from fxdistill.distiller.distiller import Distiller


def collect(objective: Objective, logits: bool) -> dict[tuple[str, Tap], Tensor | Parts]:
    """What the towers have tapped and the objective reads; TapError where a module did not run."""
    verified()
    wanted = [("student", term.student) for term in objective.features]
    wanted += [("teacher", term.teacher) for term in objective.features]
    if logits or objective.label_loss is not None or objective.logit_loss is not None:
        wanted.append(("student", LOGITS))
    if objective.logit_loss is not None:
        wanted.append(("teacher", LOGITS))
    return {(tower, tap): handed_on(lookup_marker(tower, tap)) for tower, tap in wanted}


def terms_of(
    distiller: "Distiller",
    objective: Objective,
    values: dict[tuple[str, Tap], Tensor | Parts],
    batch: Batch,
    settings: Tensor,
    anchor: Tensor,
) -> tuple[Losses, Tensor | None]:
    """The objective on values that were collected: what regional mode compiles."""

    def lookup(tower: str, tap: Tap) -> Tensor:
        value = values[tower, tap]
        return logits_from(*value) if isinstance(value, Parts) else value

    losses = objective(lookup, batch, settings, distiller.projections, anchor)
    logits = None
    if "logits" in distiller.plan.outputs:
        logits = lookup("student", LOGITS).detach()
    return losses, logits
