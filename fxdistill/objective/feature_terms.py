"""The terms of the matches: values are looked up, laid out, projected, weighed and compared."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from fxdistill.base.ranks import Ranks
from fxdistill.base.tensors import is_placed
from fxdistill.losses.names import is_named
from fxdistill.models.conventions import Task
from fxdistill.models.tap import Tap, Tower
from fxdistill.objective.arrange import arrange
from fxdistill.objective.denominators import denominator, of_features, rescaled
from fxdistill.objective.term import PAIRS, Term
from fxdistill.objective.tokens import Batch, feature_weights, lies_over
from fxdistill.objective.values import on_every_rank, ordinary, projected, require_same_shape

Lookup = Callable[[Tower, Tap], Tensor]


class Step(NamedTuple):
    """What the terms of one step share; ``counted`` are the weights of the predictions, if any."""

    batch: Batch
    task: Task | None
    projections: nn.ModuleList
    ranks: Ranks | None
    counted: Tensor | None


class Compared(NamedTuple):
    """Two values as a loss takes them, and the weights of their tokens."""

    student: Tensor
    teacher: Tensor
    weights: Tensor | None


def feature_terms(terms: Sequence[Term], lookup: Lookup, step: Step) -> Mapping[str, Tensor]:
    """The value of each match by its name, and of the loss over all pairs behind them."""
    given, share = of_features(step.batch, step.task, step.counted, step.ranks)

    def averaged(loss: Tensor, name: str, values: Compared) -> Tensor:
        loss, count, weights = ordinary(loss, name), values.student.shape[0], values.weights
        items = denominator(given, weights, count, step.ranks, loss)
        loss = rescaled(loss, weights, count, items)
        return loss if share is None else loss * share

    losses = {}
    pairs: list[Compared] = []
    for term in terms:
        values = compared(term, lookup, step)
        if term.in_pairs:
            pairs.append(values)
        else:
            losses[term.name] = averaged(term.loss(*values), term.name, values)
    if pairs:
        of_all = next(term.loss for term in terms if term.in_pairs)
        sides = ([p.student for p in pairs], [p.teacher for p in pairs], [p.weights for p in pairs])
        losses[PAIRS] = averaged(of_all(*sides), PAIRS, pairs[0])
    return losses


def compared(term: Term, lookup: Lookup, step: Step) -> Compared:
    """Both values of a match, laid out and projected, and the weights of their tokens."""
    s, t = (lookup(tower, tap) for tower, tap in term.taps)
    s, t = _laid_out(term, s, t, step.batch, step.task)
    if term.projection is not None:
        s = projected(step.projections[term.projection], s, step.ranks)
    if not term.any_shapes:
        require_same_shape(s, t, term.student.name, term.teacher.name)
    weights = _weights(term, s, step.batch, step.task)
    if (is_placed(s) or is_placed(t)) and not is_named(term.loss):
        s, t = on_every_rank(s), on_every_rank(t)
    return Compared(s, t, weights)


def _weights(term: Term, value: Tensor, batch: Batch, task: Task | None) -> Tensor | None:
    if not term.has_tokens:
        batch = batch._replace(tokens=None, attention_mask=None)
        return feature_weights(batch, task, "tokens", value)
    if term.by_teacher:
        batch = batch.of(term.of[1])
    if task == "classification" or term.keeps_tokens:
        return feature_weights(batch, task, term.stream, value, said=term.said_tokens)
    return None


_OF_STREAM = {
    "tokens": "tokens",
    "encoder": "the encoder's tokens",
    "decoder": "the decoder's tokens",
}


def weighed_by(
    term: Term, task: Task | None, batch: Batch | None = None, value: Tensor | None = None
) -> str:
    """What weighs a match, in words; for certain if the batch and the student's value are known."""
    classified = task == "classification"
    if not term.keeps_tokens and not classified:
        return "tokens, in pooling" if any(term.pools_tokens) else "nothing"
    tokens = None
    if batch is not None:
        batch = batch.of(term.of[1]) if term.by_teacher else batch
        tokens = batch.decoder_tokens if term.stream == "decoder" else batch.tokens
    known = batch is not None and value is not None
    over = tokens is not None and value is not None and lies_over(value, tokens, term.said_tokens)
    if not term.has_tokens or (known and not over):
        return "samples" if classified else "nothing"
    whose = "the teacher's tokens" if term.by_teacher else _OF_STREAM[term.stream]
    return f"samples and {whose}" if classified else whose


def _laid_out(
    term: Term, s: Tensor, t: Tensor, batch: Batch, task: Task | None
) -> tuple[Tensor, Tensor]:
    """Apply the layouts of a match to both values; pooling weighs each model's tokens."""
    ours, theirs = term.layouts
    if not ours and not theirs:
        return s, t
    if task == "classification":
        # Pooling leaves padding out; the loss applies the weight of the sample.
        batch = batch._replace(loss_mask=None, token_weights=None, labels=None)
    weights: list[Tensor | None] = []
    for tower, value, pools in zip(term.of, (s, t), term.pools_tokens, strict=True):
        w = None
        if pools:
            seen = batch.of(tower)
            w = feature_weights(seen, task, term.stream, value, said=term.said_tokens)
        weights.append(w if w is not None and w.ndim == 2 else None)
    return arrange(s, ours, t, theirs, weights[0]), arrange(t, theirs, s, ours, weights[1])
