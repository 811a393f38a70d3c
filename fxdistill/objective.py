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

from fxdistill.arrange import arrange
from fxdistill.checks import shape_problem
from fxdistill.errors import BatchError, LogitsError, ShapeError, TaskError, VocabularyError
from fxdistill.layout import Layout
from fxdistill.losses import Loss, is_named
from fxdistill.losses.reduce import is_placed
from fxdistill.ranks import Ranks, items_of, over_ranks, shared, total_over_ranks
from fxdistill.taps import Tap, check, tapped
from fxdistill.tokens import (
    Batch,
    Stream,
    Task,
    align_labels,
    feature_weights,
    prediction_weights,
    rescaled,
)

Lookup = Callable[[str, Tap], Tensor]
LOGITS = Tap("", "logits")
GLOBAL_SETTINGS = ("logit_weight", "feature_weight", "label_weight", "temperature")
PADDING_LIMIT = 0.05


@dataclass(frozen=True)
class Term:
    """One match: ``loss(student value, teacher value, weights)``, times ``weight``."""

    name: str
    loss: Loss
    student: Tap
    teacher: Tap
    weight: float = 1.0
    stream: Stream = "tokens"
    projection: int | None = None
    layouts: tuple[Layout, Layout] = ((), ())
    # What the layouts do to tokens, told here so that no pattern is read while the step is traced.
    keeps_tokens: bool = True
    pools_tokens: tuple[bool, bool] = (False, False)

    @property
    def taps(self) -> tuple[tuple[str, Tap], tuple[str, Tap]]:
        """What the term reads, by tower."""
        return ("student", self.student), ("teacher", self.teacher)


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


# Where a value is a DTensor (what imports torch.distributed is imported where it is used):


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
        from fxdistill.parallel.place import dense, everywhere

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


def lookup_marker(tower: str, tap: Tap) -> Tensor:
    """The lookup of traced and eager runs: ask the markers."""
    return tapped(tower, tap.path, tap.port, tap.call_text)


def shared_vocabulary(
    student: Tensor, teacher: Tensor, vocab_size: int | None
) -> tuple[Tensor, Tensor]:
    """Cut trailing padding columns: what is beyond both vocabularies has probability zero."""
    require_vocabulary(student, teacher, vocab_size)
    size = min(student.shape[-1], teacher.shape[-1]) if vocab_size is None else vocab_size
    if student.shape[-1] != size:
        student = student[..., :size]
    if teacher.shape[-1] != size:
        teacher = teacher[..., :size]
    return student, teacher


@check
def require_vocabulary(student: Tensor, teacher: Tensor, vocab_size: int | None) -> None:
    """Raise where the vocabularies differ by more than padding."""
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ShapeError(
            f"the student's logits are {list(student.shape)}, the teacher's {list(teacher.shape)}: "
            "they must agree in all but the vocabulary."
        )
    require_padding_only(student.shape[-1], teacher.shape[-1], vocab_size)


def require_padding_only(v_s: int, v_t: int, vocab_size: int | None) -> None:
    """Raise VocabularyError where two vocabularies differ by more than padding columns."""
    if vocab_size is not None and vocab_size > min(v_s, v_t):
        raise VocabularyError(
            f"vocab_size={vocab_size}, but the student has {v_s} columns and the teacher {v_t}."
        )
    if vocab_size is None and abs(v_s - v_t) > PADDING_LIMIT * max(v_s, v_t):
        raise VocabularyError(
            f"the student's vocabulary has {v_s} entries and the teacher's {v_t}: more than "
            "padding. If they do share their first entries, say how many are real: vocab_size=...; "
            "if the tokenizers differ, use logit_loss=None."
        )


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


@check
def require_vocabulary_last(logits: Tensor, task: str | None) -> None:
    """Raise where the losses would take another axis for the vocabulary."""
    tokens = task in ("causal_lm", "masked_lm", "seq2seq")
    if logits.ndim >= 4 or logits.ndim < (3 if tokens else 2):
        raise LogitsError(
            f"the student's logits are {list(logits.shape)}, and the losses take [B, L, V] or "
            "[B, C], the vocabulary or the classes last"
            + (f" (task {task!r})." if tokens else ".")
            + " Wrap the model so that it returns that, or give losses of your own: "
            "logit_loss=f(student, teacher, *, temperature, weights)."
        )


@check
def require_indices(labels: Tensor | None) -> None:
    """Raise where labels are not class or token numbers."""
    if labels is not None and labels.is_floating_point():
        raise BatchError(
            f"labels are {labels.dtype}, and cross entropy takes the numbers of tokens or classes: "
            "labels.long(), or a label_loss of your own for other targets."
        )


def require_task(task: str | None, logits: Tensor, batch: Batch) -> None:
    """Make sure that what is indexed by token can be lined up with the logits."""
    require_alignment(
        task,
        logits,
        batch.labels,
        batch.loss_mask,
        batch.token_weights,
        batch.attention_mask,
    )


@check
def require_alignment(
    task: str | None,
    logits: Tensor,
    labels: Tensor | None,
    loss_mask: Tensor | None,
    token_weights: Tensor | None,
    attention_mask: Tensor | None,
) -> None:
    """Raise where tokens are labelled, weighted or masked and nothing says what predicts them."""
    given = {"labels": labels, "loss_mask": loss_mask, "token_weights": token_weights}
    if attention_mask is not None and attention_mask.shape == logits.shape[:-1]:
        given["attention_mask"] = attention_mask
    names = [name for name, tensor in given.items() if tensor is not None]
    if task is None and names:
        raise TaskError(
            f"{' and '.join(names)} given, but the student does not say how tokens line up with "
            'its logits. Say it: wrap(..., task="causal_lm") where logits predict the next token, '
            '"masked_lm" or "seq2seq" where they predict their own, "classification" for [B, C].'
        )
