"""One step: teacher, student, objective. Eager runs call it; one graph is a trace of it."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxdistill.errors import LogitsError
from fxdistill.heads.unmade import Deferred
from fxdistill.models.conventions import logits_of
from fxdistill.models.tap import Tap
from fxdistill.objective.call import Inputs
from fxdistill.objective.objective import Losses, Objective
from fxdistill.objective.term import LOGITS
from fxdistill.objective.tokens import Batch
from fxdistill.taps.markers import begin, check, keep, named, tap, tapped, verified

if TYPE_CHECKING:
    from fxdistill.distiller.distiller import Distiller


def first_trainable(model: nn.Module) -> Tensor:
    """A parameter that gradients can reach."""
    return next((p for p in model.parameters() if p.requires_grad), next(model.parameters()))


def lookup_marker(tower: str, tap: Tap) -> Tensor:
    """The lookup of traced and eager runs: ask the markers."""
    return tapped(tower, tap.path, tap.port, tap.call_text)


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
    return first_trainable(distiller)


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
