"""The terms of the matches: values are looked up, laid out, projected, weighed and compared."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxdistill.base.attention import each, of_queries
from fxdistill.base.ranks import Ranks
from fxdistill.base.tensors import is_placed, on_every_rank
from fxdistill.losses.reduce import of_samples
from fxdistill.models.conventions import Task
from fxdistill.models.tap import Tap, Tower
from fxdistill.objective.arrange import arrange
from fxdistill.objective.beside import Beside
from fxdistill.objective.between_samples import compared_on_ranks, sampled
from fxdistill.objective.channels_first import AXES, as_tokens
from fxdistill.objective.denominators import denominator, of_features, over_all, rescaled
from fxdistill.objective.named_weights import named_of, require_named, times_named
from fxdistill.objective.term import PAIRS, Term
from fxdistill.objective.tokens import (
    Batch,
    chosen_weights,
    feature_weights,
    is_weighed,
    of_choices,
)
from fxdistill.objective.values import (
    ordinary,
    projected,
    require_comparable,
    require_vectors,
)

Lookup = Callable[[Tower, Tap], Any]  # to a tensor, or to Attention for the port of that name


class Step(NamedTuple):
    """What the terms of one step share; ``counted`` are the weights of the predictions, if any.

    ``weighed`` has the batch with the importance of positions, for each model whose terms take it.
    """

    batch: Batch
    task: Task | None
    beside: Beside
    ranks: Ranks | None
    counted: Tensor | None
    weighed: Mapping[Tower, Batch]

    def of(self, term: Term) -> "Step":
        """The step as a term sees it, whose tokens weigh what the model that learns gives them."""
        batch = self.weighed.get(term.of[0])
        return self if batch is None else self._replace(batch=batch)


class Compared(NamedTuple):
    """Two values as a loss takes them, and the weights of their tokens."""

    student: Any  # a tensor, or Attention
    teacher: Any
    weights: Tensor | None

    @property
    def items(self) -> int:
        """How many samples, or flattened tokens, there are."""
        return int(of_queries(self.student).shape[0])


def feature_terms(terms: Sequence[Term], lookup: Lookup, step: Step) -> Mapping[str, Tensor]:
    """The value of each match by its name, and of the loss over all pairs behind them."""
    given, share = of_features(step.batch, step.task, step.counted, step.ranks)

    def averaged(loss: Tensor, name: str, values: Compared) -> Tensor:
        loss, count, weights = ordinary(loss, name), values.items, values.weights
        items = denominator(given, weights, count, step.ranks, loss)
        loss = rescaled(loss, weights, count, items)
        return loss if share is None else loss * share

    losses = {}
    pairs: list[Compared] = []
    for term in terms:
        own = step.of(term)
        values = (attended if term.of_attention else compared)(term, lookup, own)
        if term.in_pairs:
            pairs.append(values)
        elif term.kind.sees in ("samples together", "whole maps"):
            mean = _between_samples if term.kind.sees == "samples together" else _over_samples
            loss = mean(term, values, own)
            part = share if given is None else _share_of_items(values, given, step.ranks)
            losses[term.name] = loss if part is None else loss * part
        else:
            loss = step.beside.loss_of(term, step.ranks)(*values)
            losses[term.name] = averaged(loss, term.name, values)
    if pairs:
        first = next(term for term in terms if term.in_pairs)
        sides = ([p.student for p in pairs], [p.teacher for p in pairs], [p.weights for p in pairs])
        of_all = step.beside.loss_of(first, step.ranks)
        losses[PAIRS] = averaged(of_all(*sides), PAIRS, pairs[0])
    return losses


def compared(term: Term, lookup: Lookup, step: Step) -> Compared:
    """Both values of a match, laid out and projected, and the weights of their tokens."""
    s, t = (lookup(tower, tap) for tower, tap in term.taps)
    t = t.detach() if term.constant else t
    s, t, counts = _laid_out(term, s, t, step.batch, step.task)
    if term.projection is not None:
        s = projected(step.beside.projections[term.projection], s, step.ranks)
    if True in term.channels_first:
        s, t = as_tokens(term, s, t)
    if (is_placed(s) or is_placed(t)) and not term.kind.named:
        s, t = on_every_rank(s), on_every_rank(t)
    if term.is_map and s.ndim == t.ndim == 4 and term.kind.sees == "places":
        s, t = s.transpose(1, 2), t.transpose(1, 2)  # queries first: they have the tokens' weights
        weights = _weights(term, s[:, :, 0], step.batch, step.task)
    else:
        weights = _weights(term, s, step.batch, step.task)
    if weights is not None and (term.numbers or term.said_arranged):
        require_vectors(s, weights, term.kind, term.name)
    weights = _times_counts(weights, counts, s)
    if any(term.channels_last) and (weights is None or weights.ndim == 1):
        s, t = (
            _channels_first(x, last) for x, last in zip((s, t), term.channels_last, strict=True)
        )
    if term.kind.sees != "places":
        s, t, weights = _by_sample(term, s, t, weights, step.batch)
    names = (term.student.name, term.teacher.name, term.kind.name)
    require_comparable(s, t, term.compares, *names)
    require_named(term, (s, t), step.batch)
    if term.kind.sees != "samples together":
        weights = times_named(weights, term, s, step.batch)
    return Compared(s, t, weights)


def attended(term: Term, lookup: Lookup, step: Step) -> Compared:
    """How both models attend, and the weights of the queries."""
    s, t = (each(on_every_rank, lookup(tower, tap)) for tower, tap in term.taps)
    t = each(Tensor.detach, t) if term.constant else t
    queries = of_queries(s)
    weights = _weights(term, queries, step.batch, step.task)
    weights = times_named(weights, term, queries, step.batch)
    return Compared(s, t, weights)


def _channels_first(x: Tensor, last: bool) -> Tensor:
    """A map ``[B, *places, C]`` as losses take it, ``[B, C, *places]``."""
    return x.movedim(-1, 1) if last and x.ndim > 3 else x


def _by_sample(
    term: Term, s: Tensor, t: Tensor, weights: Tensor | None, batch: Batch
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Flattened tokens ``[B·L, D]`` as ``[B, L, D]``, for a loss that looks at a whole sample."""
    seen = batch.of(term.of[1]) if term.by_teacher else batch
    seen = seen.under(term.stream, s, said=term.said_arranged)
    tokens = seen.decoder_tokens if term.stream == "decoder" else seen.tokens
    keeps = term.has_tokens and (term.keeps_tokens or term.said_arranged)
    flat = tokens is not None and s.ndim == 2 and keeps
    if not flat or tokens is None or s.shape[0] != tokens.shape[0] * tokens.shape[1]:
        return s, t, weights
    grid = (int(tokens.shape[0]), -1)
    s, t = (x.reshape(*grid, x.shape[-1]) for x in (s, t))
    return s, t, None if weights is None else weights.reshape(*grid)


def _between_samples(term: Term, values: Compared, step: Step) -> Tensor:
    """The loss of a match whose samples are compared with each other, on however many ranks."""
    batch, task, of_samples = step.batch, step.task, None
    if task == "classification" or _by_sample_alone(term, batch):
        # Only padding is left out of the mean over a sample.
        of_samples = of_choices(chosen_weights(batch), batch.tokens, values.student)
        batch = batch._replace(loss_mask=None, token_weights=None, labels=None)
    if any(term.pools_tokens) and values.weights is not None:
        of_samples = values.weights  # with samples that are all padding
    of_student = _weights(term, values.student, batch, task)
    of_teacher = _weights(term, values.teacher, batch.of(term.of[1]), task)
    if (named := named_of(term, values.student, step.batch)) is not None:
        if named.ndim == 1:
            of_samples = named if of_samples is None else of_samples * named
        else:
            of_student, of_teacher = (
                times_named(w, term, x, step.batch)
                for w, x in ((of_student, values.student), (of_teacher, values.teacher))
            )
    sides = sampled((values.student, values.teacher), (of_student, of_teacher), of_samples)
    return compared_on_ranks(term, sides, step.beside, step.ranks)


def _over_samples(term: Term, values: Compared, step: Step) -> Tensor:
    """The mean over samples of a loss of whole maps, as this rank's part of that of all ranks."""
    loss = ordinary(step.beside.loss_of(term, step.ranks)(*values), term.name)
    weights = None if values.weights is None else of_samples(values.weights)
    items = denominator(None, weights, values.items, step.ranks, loss)
    return rescaled(loss, weights, values.items, items)


def _share_of_items(values: Compared, items: Tensor, ranks: Ranks | None) -> Tensor:
    """The share of the given number of items that this batch has, on all ranks."""
    weights = values.weights
    if weights is None:
        like = of_queries(values.student)
        weights = torch.ones(like.shape[0], device=like.device)
    total = over_all(weights, ranks)
    return torch.where(items == 0, 0, total / torch.where(items == 0, 1, items))


def _weights(term: Term, value: Tensor, batch: Batch, task: Task | None) -> Tensor | None:
    if not term.has_tokens or (term.channels_first[0] and value.ndim == AXES):
        batch = batch._replace(tokens=None, attention_mask=None)
        return feature_weights(batch, task, "tokens", value)
    if term.by_teacher:
        batch = batch.of(term.of[1])
    said = term.said_arranged
    if task == "classification" or term.keeps_tokens or said:
        return feature_weights(batch, task, term.stream, value, said=said, numbers=term.numbers)
    return None


def _by_sample_alone(term: Term, batch: Batch) -> bool:
    """Whether a mask is ``[B]`` because its value has no tokens that it could be of."""
    of_tokens = term.has_tokens and not (batch.tokens is None and batch.decoder_tokens is None)
    chosen = chosen_weights(batch)
    return not of_tokens and chosen is not None and chosen.ndim == 1


def _times_counts(weights: Tensor | None, counts: Tensor | None, value: Tensor) -> Tensor | None:
    """The weights of a value, times whether each of its samples has tokens that count."""
    if counts is None or value.shape[0] != counts.shape[0]:
        return weights
    if weights is None:
        return counts
    return weights * counts.reshape(-1, *(1,) * (weights.ndim - 1))


def _laid_out(
    term: Term, s: Tensor, t: Tensor, batch: Batch, task: Task | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Apply the layouts of a match to both values; pooling weighs each model's tokens.

    The third is ``[B]``: 0 for samples whose tokens all weigh nothing in a pooling, 1 for others.
    """
    ours, theirs = term.layouts
    if not ours and not theirs:
        return s, t, None
    if task == "classification":
        # Pooling leaves padding out; the loss applies the weight of the sample.
        batch = batch._replace(loss_mask=None, token_weights=None, labels=None)
    weights: list[Tensor | None] = []
    counts: Tensor | None = None
    ends = zip(term.of, (s, t), term.pools_tokens, term.keeps_samples, strict=True)
    for tower, value, pools, keeps in ends:
        w = None
        if pools:
            seen = batch.of(tower)
            w = feature_weights(seen, task, term.stream, value, said=term.said_tokens)
            w = w if w is not None and w.ndim == 2 else None
            if w is not None and keeps and is_weighed(seen, term.stream):
                some = (w != 0).any(1).to(w.dtype)
                counts = some if counts is None else counts * some
        weights.append(w)
    s, t = arrange(s, ours, t, theirs, weights[0]), arrange(t, theirs, s, ours, weights[1])
    return s, t, counts
