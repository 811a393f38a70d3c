"""Whether labels have the grid of the logits, or one of their own, as a transcript of sound has."""

from dataclasses import replace

from torch import nn

from fxdistill.losses.names import is_named
from fxdistill.models.conventions import input_names, predicts_frames
from fxdistill.objective.call import Call, Inputs
from fxdistill.objective.objective import Objective


def of_labels(objective: Objective, call: Call, main: nn.Module, inputs: Inputs) -> Objective:
    """The objective of a call: without terms of labels where it has none.

    A label loss of the user's own gets labels of sound as they are, however many there are: some
    batch has as many as frames by chance. ``inputs`` are those of ``main``.
    """
    if call.batch.labels is None:
        return objective.without_labels()
    if objective.task != "masked_lm" or all(is_named(term.loss) for term in objective.labels):
        return objective
    given = (*input_names(main)[: len(inputs.args)], *inputs.kwargs)
    return replace(objective, labels_apart=True) if predicts_frames(main, given) else objective
