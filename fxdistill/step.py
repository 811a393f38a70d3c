"""One step: teacher, student, objective. Eager runs call it; one graph is a trace of it."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxdistill import guards
from fxdistill.call import Inputs
from fxdistill.deferred import Deferred, Parts, handed_on
from fxdistill.errors import LogitsError
from fxdistill.head import logits_from
from fxdistill.objective import LOGITS, Losses, Objective, lookup_marker
from fxdistill.roles import logits_of
from fxdistill.taps import Tap, begin, check, keep, named, tap, verified
from fxdistill.tokens import Batch

if TYPE_CHECKING:
    from fxdistill.distiller import Distiller


def step(
    distiller: "Distiller",
    objective: Objective,
    student: Inputs,
    teacher: Inputs,
    batch: Batch,
    settings: Tensor,
) -> tuple[Losses, Tensor | None]:
    """Teacher, student, objective: what becomes one graph, and what eager mode runs."""
    anchor = run_towers(distiller, objective, student, teacher)
    begin("objective")
    verified()
    losses = objective(lookup_marker, batch, settings, distiller.projections, anchor)
    logits = None
    if "logits" in distiller.plan.outputs:
        logits = named(lookup_marker("student", LOGITS).detach(), "logits_output")
    terms = {name: named(value, name) for name, value in losses.terms.items()}
    return Losses(named(losses.total, "loss"), terms), logits


def run_towers(
    distiller: "Distiller",
    objective: Objective,
    student: Inputs,
    teacher: Inputs,
) -> Tensor:
    """Run the models; what they compute leaves through taps. Returns the anchor of the total."""
    frozen = distiller.plan.freeze_teacher
    needs_logits = objective.label_loss is not None or "logits" in distiller.plan.outputs
    if objective.uses_teacher:
        begin("teacher")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            output = distiller.run("teacher", teacher)
            if objective.logit_loss is not None:
                _tap_logits(output, "teacher")
    begin("student")
    output = distiller.run("student", student)
    if needs_logits or objective.logit_loss is not None:
        _tap_logits(output, "student")
    return guards.first_trainable(distiller)


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


def _tap_logits(output: Any, tower: str) -> None:
    logits = logits_of(output)
    if logits is None:
        no_logits(tower)
    elif isinstance(logits, Deferred):
        keep(logits, LOGITS.path, LOGITS.port)
    else:
        tap(logits, tower, LOGITS.path, LOGITS.port)


@check
def no_logits(tower: str) -> None:
    """Raise because a term needs logits."""
    raise LogitsError(
        f"the {tower} returns no logits. A model's logits are its tensor output, or its "
        "'logits' field or key. Wrap the model with its head, or use logit_loss=None and pass no "
        "labels."
    )
