"""Notes: things that work and may surprise."""

from collections.abc import Mapping

from torch import Tensor

from fxdistill.models.tap import Tower
from fxdistill.objective.objective import Objective


def notes_of(objective: Objective, settings: Mapping[str, float | Tensor]) -> list[str]:
    """The notes on an objective and its weights."""
    weightless = [
        term.name
        for term in objective.features
        if not term.keeps_tokens and not any(term.pools_tokens)
    ]
    notes = []
    if weightless and objective.task != "classification":
        names = ", ".join(weightless)
        notes.append(f"token weights and masks do not apply to {names}: no axes [B, L] in front")
    if objective.importance is not None:
        notes.append(f"the logit loss weighs predictions by importance: {objective.importance}")
    zero = settings["feature_weight"]
    if objective.features and not isinstance(zero, Tensor) and zero == 0:
        notes.append("feature_weight is 0: matches teach nothing until set(feature_weight=...)")
    return notes


def settled(tower: Tower, count: int) -> list[str]:
    """The note on a frozen model of which ``count`` modules were in training mode."""
    return [f"{count} modules of the {tower} were in training mode: eval now"] if count > 0 else []
