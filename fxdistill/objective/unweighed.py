"""Values that no mask weighs, though the call has one: their padding may count."""

from typing import Any

from torch import Tensor

from fxdistill.base.figures import shown
from fxdistill.objective.arrange import arranged_shape
from fxdistill.objective.term import Term
from fxdistill.objective.tokens import Batch


def unweighed(term: Term, student: Tensor, teacher: Tensor, batch: Batch) -> str:
    """What to warn of where padding in the values of a match counts; ``""`` where none can.

    Only shapes are read, as the numbers that they are in this call. Values of other places than
    tokens have them too (latent vectors): whether these follow the text, the models have to tell.
    """
    knows = term.of_attention or term.is_map or term.channels_first[0]
    if not term.watched or term.weights is not None or knows:
        return ""
    ours, theirs = term.layouts
    if any(term.pools_tokens):
        ends = zip(term.of, (student, teacher), term.pools_tokens, strict=True)
        sides = [(shown(x.shape), batch.of(tower)) for tower, x, pools in ends if pools]
    else:
        sides = [(shown(arranged_shape(student, ours, teacher, theirs)), batch)]
    found = (_problem(term, shape, seen) for shape, seen in sides)
    return next(filter(None, found), "")


def _problem(term: Term, shape: list[Any], batch: Batch) -> str:
    mask = _mask(term, batch)
    if mask is None or len(shape) != 3:
        return ""
    size, length = shown(mask.shape[:2])
    given = [x for x in (batch.loss_mask, batch.token_weights) if x is not None]
    if any(shown(x.shape) == shape[:2] for x in given):
        return ""
    masks = (mask, *(batch.frames if term.stream != "decoder" else ()))
    lies = any(shown(x.shape[:2]) == shape[:2] for x in masks)
    what = (
        f"nothing weighs {term.name}, so that padding in it counts: it compares values {shape}, "
        f"and the mask is [{size}, {length}]."
    )
    said = "'input'" if term.stream == "tokens" else f"{term.stream!r}"
    if not (term.keeps_tokens or any(term.pools_tokens)):
        weighs = f"a layout has brought the tokens there, Match(tokens={said}) lets it weigh them."
        return f"{what} If {weighs}" if lies else ""
    if size not in shape[:2] or (lies and term.has_tokens):
        return ""
    if shape[1 if shape[0] == size else 0] == 1:
        return ""  # the one value of a sample
    advice = "Match(weights=...) lets a call say which of their places count"
    if shape[0] != size or shape[:2] == [length, size]:
        advice += f"; rearrange='l b d -> b l d' with tokens={said} turns values [L, B, D]"
    elif lies:
        advice = f"If these are its tokens, Match(tokens={said}) says so"
    return f"{what} {advice}; Match(tokens=None) says that all places count."


def _mask(term: Term, batch: Batch) -> Tensor | None:
    """The tensor ``[B, L]`` that tells padding among the tokens of a match."""
    mask = batch.attention_mask
    if term.stream == "decoder":
        mask = batch.labels if batch.decoder_mask is None else batch.decoder_mask
    return mask if mask is not None and mask.ndim == 2 else None
