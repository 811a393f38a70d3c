"""What weighs the values of a match, in words, for reports and summaries."""

from typing import Any

import torch
from torch import Tensor

from fxdistill.base.attention import Attention, of_queries
from fxdistill.base.ranks import Ranks
from fxdistill.errors import LayoutError
from fxdistill.models.conventions import Task
from fxdistill.objective.arrange import arranged_shape
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
    axes: int | None = None,
    *,
    nothing: bool = False,
) -> str:
    """What weighs a match, in words; for certain if the batch and the student's value are known.

    ``value`` is the student's as the layout of the match leaves it; ``axes`` says how many axes it
    has, where no more is known.
    ``ranks`` are those that hold samples: a loss between samples says whose it compares.
    ``nothing`` says that a step has found no tokens of the call's in its values.
    """
    said = "nothing" if nothing else _whose(term, task, batch, value)
    if value is None and axes is not None and "tokens" in said and not any(term.pools_tokens):
        said = _by_axes(term, task, axes, said)
    if term.weights is not None:
        said = repr(term.weights) if said == "nothing" else f"{said} × {term.weights!r}"
    if term.kind.sees == "samples together" and ranks is not None:
        whose = f"all {ranks.size} ranks" if term.kind.across else "each rank alone"
        said = f"{said}; samples of {whose}"
    return said


def as_compared(term: Term, student: Any, teacher: Any) -> Tensor | None:
    """The student's value as its layout leaves it; where tokens attend, that of the queries."""
    if student is None or term.of_attention or (term.is_map and term.kind.sees == "places"):
        return None if student is None else of_queries(student)
    (ours, theirs), known = term.layouts, isinstance(teacher, Tensor)
    if not ours or not known or isinstance(student, Attention):
        return student if isinstance(student, Tensor) else None
    try:
        return torch.empty(arranged_shape(student, ours, teacher, theirs), device="meta")
    except LayoutError:  # which the step raises
        return student  # type: ignore[no-any-return]


def _by_axes(term: Term, task: Task | None, axes: int, said: str) -> str:
    """What weighs a value of so many axes, where ``said`` does if these are tokens'."""
    if axes == AXES or term.said_arranged or term.numbers or term.of_attention or term.is_map:
        return said
    if axes == 2:
        return f"{said}, if it is [B·L, D]"
    return "samples" if task == "classification" else "nothing"


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
    over = False
    if tokens is not None and value is not None:
        over = lies_over(value, tokens, term.said_arranged, term.numbers)
    over &= not (term.channels_first[0] and value is not None and value.ndim == AXES)
    if not term.has_tokens or (known and not over):
        return "samples" if classified else "nothing"
    whose = "the teacher's tokens" if term.by_teacher else _OF_STREAM[term.stream]
    if classified:
        return f"samples and {whose}"
    return f"{whose}, in pooling" if term.kind.sees == "samples together" else whose
