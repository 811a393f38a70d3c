"""The objective: which loss, on which values, with which weight.

L = λ_logit · L_logit + λ · (1/N) Σ weight_i · loss_i + λ_label · L_label

One object computes it for eager, regional and captured runs alike: the captured graph is a trace of
the very same lines.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fxdistill import base
from fxdistill.base.ranks import Ranks, items_of, over_ranks, shared, total_over_ranks
from fxdistill.base.tensors import is_placed
from fxdistill.errors import ShapeError
from fxdistill.losses.names import Loss, is_named
from fxdistill.models.conventions import Task
from fxdistill.models.tap import Tap
from fxdistill.objective.arrange import arrange
from fxdistill.objective.checks import shape_problem
from fxdistill.objective.term import LOGITS, Term
from fxdistill.objective.tokens import (
    Batch,
    align_labels,
    feature_weights,
    prediction_weights,
    rescaled,
)
from fxdistill.objective.vocabulary import (
    require_indices,
    require_task,
    require_vocabulary_last,
    shared_vocabulary,
)
from fxdistill.taps.markers import check

Lookup = Callable[[str, Tap], Tensor]


class Losses(NamedTuple):
    """The total, with gradients, and the unweighted terms by name, without."""

    total: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """All terms of a distiller. ``None`` for a loss turns its term off."""

    features: tuple[Term, ...] = ()
    logit_loss: Loss | None = None
    label_loss: Loss | None = None
    task: Task | None = None
    vocab_size: int | None = None
    freeze_teacher: bool = True
    ranks: Ranks | None = None  # where samples lie on several ranks
    own_losses: bool = True  # whether logit and label losses are the library's, and so their shapes

    @property
    def uses_teacher(self) -> bool:
        """Whether any term compares with the teacher."""
        return bool(self.features) or self.logit_loss is not None

    @property
    def can_fuse(self) -> bool:
        """Whether the fused head knows the losses, and the teacher needs no gradient of it."""
        return self.own_losses and self.freeze_teacher

    def on(self, ranks: Ranks | None) -> "Objective":
        """The objective of a call whose samples lie on ``ranks``, where that is not known yet."""
        return self if ranks is None or self.ranks is not None else replace(self, ranks=ranks)

    def without_labels(self) -> "Objective":
        """The objective of a call that brings no labels."""
        return replace(self, label_loss=None)

    def __call__(
        self,
        lookup: Lookup,
        batch: Batch,
        settings: Tensor,
        projections: torch.nn.ModuleList,
        anchor: Tensor,
    ) -> Losses:
        """Compute the total and its terms.

        ``lookup(tower, tap)`` gives the tapped values; ``settings`` is a vector: the weights of
        logits, features and labels, the temperature, then one weight for each match. ``anchor`` is
        a trainable value that ties a total without any term to the student (its gradient is zero).
        """
        if self.freeze_teacher:
            lookup = without_teacher_gradients(lookup)
        logit_weight, feature_weight, label_weight, temperature = settings[:4].unbind()
        parts: list[Tensor] = []
        task = self.task
        terms: dict[str, Tensor] = {}
        if self.logit_loss is not None or self.label_loss is not None:
            student = lookup("student", LOGITS)
            task = task or ("classification" if student.ndim == 2 else None)
            if self.own_losses:
                require_vocabulary_last(student, task)
                require_indices(batch.labels)
            require_task(task, student, batch)
            weights = prediction_weights(batch, task, student)
            items = self._items(batch.num_items, weights, 0, student)
            if self.logit_loss is not None:
                s, t = shared_vocabulary(student, lookup("teacher", LOGITS), self.vocab_size)
                if not self.own_losses:
                    s, t = on_every_rank(s), on_every_rank(t)
                loss = self.logit_loss(s, t, temperature=temperature, weights=weights)
                loss = ordinary(loss, "logits")
                loss = rescaled(loss, weights, 0, items)
                parts.append(logit_weight * loss)
                terms["logits"] = loss.detach()
            if self.label_loss is not None:
                assert batch.labels is not None
                assert task is not None
                labels = align_labels(batch.labels, task)
                if not self.own_losses:
                    student = on_every_rank(student)
                loss = ordinary(self.label_loss(student, labels, weights=weights), "labels")
                loss = rescaled(loss, weights, 0, items)
                parts.append(label_weight * loss)
                terms["labels"] = loss.detach()
        if self.features:
            weight = settings[4:].unbind()
            named = self._feature_terms(lookup, batch, task, projections)
            weighted = [w * loss for w, loss in zip(weight, named.values(), strict=True)]
            mean = torch.stack(weighted).sum() / len(self.features)
            parts.append(feature_weight * mean)
            terms["features"] = mean.detach()
            terms.update({name: loss.detach() for name, loss in named.items()})
        total = torch.stack(parts).sum() if parts else anchor.reshape(-1)[:1].sum() * 0.0
        return Losses(total, terms) if self.ranks is None else together(total, terms, self.ranks)

    def _feature_terms(
        self, lookup: Lookup, batch: Batch, task: Task | None, projections: torch.nn.ModuleList
    ) -> dict[str, Tensor]:
        losses = {}
        for term in self.features:
            s, t = lookup("student", term.student), lookup("teacher", term.teacher)
            s, t = _laid_out(term, s, t, batch, task)
            if term.projection is not None:
                s = projected(projections[term.projection], s, self.ranks)
            require_same_shape(s, t, term.student.name, term.teacher.name)
            weights = None
            if task == "classification" or term.keeps_tokens:
                weights = feature_weights(batch, task, term.stream, s)
            if (is_placed(s) or is_placed(t)) and not is_named(term.loss):
                s, t = on_every_rank(s), on_every_rank(t)
            loss = ordinary(term.loss(s, t, weights), term.name)
            items = self._items(batch.num_feature_items, weights, s.shape[0], loss)
            losses[term.name] = rescaled(loss, weights, s.shape[0], items)
        return losses

    def _items(
        self, given: Tensor | None, weights: Tensor | None, count: int, like: Tensor
    ) -> Tensor | None:
        """What a term is divided by, where that is not its own Σ w."""
        if given is not None or self.ranks is None:
            return given
        return items_of(weights, count, self.ranks, like)


def together(total: Tensor, terms: dict[str, Tensor], ranks: Ranks) -> Losses:
    """What each rank adds, summed."""
    summed = {name: over_ranks(value, ranks.groups) for name, value in terms.items()}
    return Losses(total_over_ranks(total, ranks.groups, ranks.scale), summed)


def _laid_out(
    term: Term, s: Tensor, t: Tensor, batch: Batch, task: Task | None
) -> tuple[Tensor, Tensor]:
    """Both values by the layouts of their match; pooling counts tokens by their weights."""
    ours, theirs = term.layouts
    if not ours and not theirs:
        return s, t
    if task == "classification":
        # Pooling leaves padding out; how much the sample counts is for the loss to say.
        batch = batch._replace(loss_mask=None, token_weights=None, labels=None)
    weights: list[Tensor | None] = []
    for value, pools in zip((s, t), term.pools_tokens, strict=True):
        w = feature_weights(batch, task, term.stream, value) if pools else None
        weights.append(w if w is not None and w.ndim == 2 else None)
    return arrange(s, ours, t, theirs, weights[0]), arrange(t, theirs, s, ours, weights[1])


# Where a value is a DTensor:


def on_every_rank(value: Tensor) -> Tensor:
    """All of ``value`` as a plain tensor, for a loss of the user's own.

    Such a loss is as right as on one device. On shards it would often not be: torch's own mean of
    squares has a gradient there that is too large by the number of ranks.
    """
    return value.full_tensor() if is_placed(value) else value


def projected(projection: torch.nn.Module, value: Tensor, ranks: Ranks | None) -> Tensor:
    """``projection(value)``; its weights stay plain tensors, alike on every rank."""
    summed = ranks is not None and ranks.projections
    if not is_placed(value) and not summed:
        return projection(value)  # type: ignore[no-any-return]
    weights: dict[str, Tensor] = dict(projection.named_parameters())
    if ranks is not None and summed:
        groups, scale = ranks.groups, ranks.scale
        weights = {name: shared(weight, groups, scale) for name, weight in weights.items()}
    if is_placed(value):
        everywhere, dense = base.placement.everywhere, base.placement.dense
        weights = {name: everywhere(weight, value) for name, weight in weights.items()}
        value = dense(value)
    return torch.func.functional_call(projection, weights, (value,))  # type: ignore[no-any-return]


def ordinary(loss: Tensor, name: str) -> Tensor:
    """What a loss returned, as a plain scalar; a DTensor's pending sum is made."""
    require_scalar(loss, name)
    return loss.full_tensor() if is_placed(loss) else loss


def without_teacher_gradients(lookup: Lookup) -> Lookup:
    """A teacher may switch gradients on inside: what it hands over is cut off all the same."""

    def detached(tower: str, tap: Tap) -> Tensor:
        value = lookup(tower, tap)
        return value.detach() if tower == "teacher" else value

    return detached


@check
def require_same_shape(student: Tensor, teacher: Tensor, s_name: str, t_name: str) -> None:
    """Raise where the two values of a match cannot be compared."""
    if (problem := shape_problem(student.shape, teacher.shape, s_name, t_name)) is not None:
        raise problem


@check
def require_scalar(loss: Tensor, name: str) -> None:
    """Raise where a loss is not one number: a sum of its entries is not what was meant."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ShapeError(
            f"the loss of {name!r} returned {what}: a loss returns a scalar. Average over the "
            "tokens, by the weights it is given: (weights * value).sum() / weights.sum()."
        )
