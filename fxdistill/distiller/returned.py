"""What a step returns beside its losses."""

from fxdistill.distiller.modes import Steps
from fxdistill.distiller.towers import Towers
from fxdistill.objective.objective import Objective


def in_evaluation(objective: Objective, towers: Towers, steps: Steps) -> Objective:
    """The objective of a step that gives predictions unasked: logits, where the model has any.

    Where no term reads them and a mesh shards the sequence or the vocabulary, they may be one
    rank's columns, and stay where they are.
    """
    found = objective.returning(towers.main)
    if found.returns_if_any and steps.meshes(towers)[towers.main].sizes:
        return objective
    return found
