"""What weighs the values of a match, in words, for reports and summaries."""

from torch import Tensor

from fxdistill.base.ranks import Ranks
from fxdistill.models.conventions import Task
from fxdistill.objective.channels_first import AXES
from fxdistill.objective.term import Term
from fxdistill.objective.tokens import Batch, lies_over

_OF_STREAM = {
    "tokens": "tokens",
    "encoder": "the encoder's tokens",
    "decoder": "the decoder's tokens",
}


def weighed_by(
    term: Term,
    task: Task | None,
    batch: Batch | None = None,
    value: Tensor | None = None,
    ranks: Ranks | None = None,
    *,
    nothing: bool = False,
) -> str:
    """What weighs a match, in words; for certain if the batch and the student's value are known.

    ``ranks`` are those that hold samples: a loss between samples says whose it compares.
    ``nothing`` says that a step has found no tokens of the call's in its values.
    """
    said = "nothing" if nothing else _whose(term, task, batch, value)
    if term.weights is not None:
        said = repr(term.weights) if said == "nothing" else f"{said} × {term.weights!r}"
    if term.kind.sees == "samples together" and ranks is not None:
        whose = f"all {ranks.size} ranks" if term.kind.across else "each rank alone"
        said = f"{said}; samples of {whose}"
    return said


def _whose(term: Term, task: Task | None, batch: Batch | None, value: Tensor | None) -> str:
    classified = task == "classification"
    if not (term.keeps_tokens or term.said_arranged) and not classified:
        return "tokens, in pooling" if any(term.pools_tokens) else "nothing"
    tokens = None
    if batch is not None:
        batch = batch.of(term.of[1]) if term.by_teacher else batch
        if value is not None:
            batch = batch.under(term.stream, value, said=term.said_arranged)
        tokens = batch.decoder_tokens if term.stream == "decoder" else batch.tokens
    known = batch is not None and value is not None
    over = tokens is not None and value is not None and lies_over(value, tokens, term.said_arranged)
    over &= not (term.channels_first[0] and value is not None and value.ndim == AXES)
    if not term.has_tokens or (known and not over):
        return "samples" if classified else "nothing"
    whose = "the teacher's tokens" if term.by_teacher else _OF_STREAM[term.stream]
    if classified:
        return f"samples and {whose}"
    return f"{whose}, in pooling" if term.kind.sees == "samples together" else whose
