"""What a term is divided by: its own Σ w, Σ w over ranks, or a given number of items."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxdistill.base.nodes import one_node
from fxdistill.base.ranks import Ranks, items_of
from fxdistill.errors import BatchError
from fxdistill.losses.reduce import IGNORE
from fxdistill.models.conventions import Task
from fxdistill.objective.term import HeadTerm
from fxdistill.objective.tokens import Batch, prediction_weights


def denominator(
    given: Tensor | None, weights: Tensor | None, count: int, ranks: Ranks | None, like: Tensor
) -> Tensor | None:
    """The denominator of a term, where it is not the term's own Σ w."""
    if given is not None or ranks is None:
        return given
    return items_of(weights, count, ranks, like)


def items_elsewhere(given: Tensor, weights: Tensor, counts: Tensor, ranks: Ranks | None) -> Tensor:
    """The denominator of Σ w·v where the ``given`` items count other things than w does.

    A speech model predicts frames, and its labels are fewer; a head that looks two tokens ahead
    predicts fewer than there are next tokens; trainers count labels, whatever their weights. The
    mean of v over a batch weighs by the batch's share of what is counted.
    """
    count = over_all(counts, ranks)
    items = over_all(weights, ranks) / count.clamp(min=1) * given
    return torch.where(count == 0, torch.full_like(items, torch.inf), items)  # a share of 0


def counted_labels(labels: Tensor, task: Task | None) -> Tensor:
    """The labels that ``num_items_in_batch`` counts: those that are not −100.

    The first token of a text is not among them in a causal model, which cannot predict it.
    """
    told = labels[..., 1:] if task == "causal_lm" else labels
    return (told != IGNORE).float()


def over_all(weights: Tensor, ranks: Ranks | None) -> Tensor:
    """Σ w over all ranks."""
    return weights.sum() if ranks is None else items_of(weights, 0, ranks, weights)


def of_features(
    batch: Batch, task: Task | None, counted: Tensor | None, ranks: Ranks | None
) -> tuple[Tensor | None, Tensor | None]:
    """The given denominator of feature terms, or else this batch's share of all items.

    Loops that accumulate gradients may give ``num_items`` alone, which counts predictions, and
    trainers give the number of labels. The mean of a feature over its own batch, times the share of
    the batch in these, sums up to the mean over all batches, each weighed by its predictions.
    """
    items, given = batch.num_feature_items, batch.num_items
    if items is None and given is None and batch.labels is not None:
        given, counted = batch.num_items_in_batch, counted_labels(batch.labels, task)
    if items is not None or given is None:
        return items, None
    if counted is None and batch.labels is not None:
        tokens = batch.decoder_tokens if task == "seq2seq" else batch.tokens
        on_tokens = tokens is not None and batch.labels.shape == tokens.shape[:2]
        if on_tokens or task == "classification":
            counted = prediction_weights(batch, task, batch.labels.unsqueeze(-1))
        else:  # labels of a grid of their own
            counted = (batch.labels != IGNORE).float()
    if counted is None:
        return given, None
    return None, over_items(over_all(counted, ranks), None, 1, given)


def check_counted_heads(heads: Sequence[HeadTerm], batch: Batch) -> None:
    """Raise BatchError where a call counts the items of a head that there is not."""
    known = [head.name for head in heads]
    for name in batch.head_items or {}:
        if name not in known:
            raise BatchError(
                f"num_head_items={{{name!r}: ...}}: there is no head of that name; heads= has "
                f"{', '.join(map(repr, known)) or 'none'}."
            )


def rescaled(value: Tensor, weights: Tensor | None, count: int, items: Tensor | None) -> Tensor:
    """``value`` over ``items``, if they are given; otherwise ``value`` as it is."""
    return value if items is None else over_items(value, weights, count, items)


@one_node
def over_items(value: Tensor, weights: Tensor | None, count: int, items: Tensor) -> Tensor:
    """Turn a mean, Σ w·v / Σ w, into Σ w·v / items: gradient accumulation sets the denominator.

    Without weights, the mean is over ``count`` values.
    """
    total: Tensor | int = count if weights is None else weights.sum()
    # Without any items nothing counts, and the value is 0 already.
    return value * (total / torch.where(items == 0, torch.ones_like(items), items))
