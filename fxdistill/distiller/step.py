"""One step: models, then objective. Eager mode calls it; the one graph is a trace of it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxdistill.distiller.towers import Towers
from fxdistill.errors import LogitsError
from fxdistill.heads.unmade import UnmadeLogits
from fxdistill.models.conventions import logits_of
from fxdistill.models.tap import Tower
from fxdistill.objective.call import Inputs
from fxdistill.objective.objective import Losses, Objective
from fxdistill.objective.term import LOGITS
from fxdistill.objective.tokens import Batch
from fxdistill.taps.attention import lookup
from fxdistill.taps.markers import begin, check, further_logits, keep, named, tap, verified
from fxdistill.taps.ports import tensors_at


def step(
    towers: Towers,
    objective: Objective,
    inputs: Mapping[Tower, Inputs],
    batch: Batch,
    settings: Tensor,
) -> tuple[Losses, Tensor | None]:
    """Run the models, then the objective. Eager mode calls this; one-graph mode traces it."""
    anchor, given = run_towers(towers, objective, inputs)
    begin("objective")
    verified()
    losses = objective(lookup, batch, settings, towers.beside, anchor)
    logits = None
    if objective.returns is not None and given:
        logits = named(lookup(objective.returns, LOGITS).detach(), "logits_output")
    terms = {name: named(value, name) for name, value in losses.terms.items()}
    metrics = {name: named(value, f"metrics.{name}") for name, value in losses.metrics.items()}
    return Losses(named(losses.total, "loss"), terms, metrics), logits


def run_towers(
    towers: Towers, objective: Objective, inputs: Mapping[Tower, Inputs]
) -> tuple[Tensor, bool]:
    """Run the models, whose values are read through taps, and return the anchor of the total.

    The main model always runs; another model runs only if a term reads it. The second says whether
    there are the logits that the step returns, which a model without them may leave out.
    """
    read, with_logits, given = objective.towers, objective.with_logits, True
    for tower in towers.modules:
        if tower == towers.main or tower in read:
            begin(tower)
            if tower in towers.frozen:
                with torch.set_grad_enabled(False):
                    output = towers.run(tower, inputs[tower])
            else:
                output = towers.run(tower, inputs[tower])
            if tower not in with_logits:
                continue
            if tower in objective.needing_logits or isinstance(logits_of(output), Tensor):
                _tap_logits(output, tower)
            else:
                given = False
    return towers.anchor(), given


def _tap_logits(output: Any, tower: Tower) -> None:
    logits, fields = logits_of(output), further_fields(output)
    if fields:
        further_logits(tower, fields)
    if logits is None:
        no_logits(tower, fields)
    elif isinstance(logits, UnmadeLogits):
        keep(logits, LOGITS.path, LOGITS.port)
    else:
        tap(logits, tower, LOGITS.path, LOGITS.port)


def further_fields(output: Any) -> str:
    """The tensors of an output that are logits beside its own, as those of MTP heads.

    They are named as ports: of a list each entry, ``"mtp_logits[0], mtp_logits[1]"``.
    """
    if not isinstance(output, Mapping):
        return ""
    fields = [name for name in output if "logits" in str(name) and name != "logits"]
    return ", ".join([port for name in fields for port in tensors_at(output[name], str(name))])


@check
def no_logits(tower: Tower, fields: str) -> None:
    """Raise LogitsError: a term needs the logits of a model that returns none.

    ``fields`` are those of its output that are logits by another name, as those of two towers are.
    """
    advice = "Wrap the model with its head, or use logit_loss=None and pass no labels."
    if fields:
        advice = (
            f"Its output has {fields}. To distil one of these, wrap modules of your own around "
            "both models: each keeps its model as self.model, and its forward(self, **inputs) "
            f"returns self.model(**inputs).{fields.partition(',')[0]}. A head (heads=) cannot "
            "take the place of a model's own logits: it is beside them. For matches alone, use "
            "logit_loss=None and pass no labels."
        )
    raise LogitsError(
        f"the {tower} returns no logits. A model's logits are its tensor output, or its "
        f"'logits' field or key. {advice}"
    )
