"""Check that two vocabularies, and the labels, fit each other."""

from torch import Tensor

from fxdistill.base.figures import number, shown
from fxdistill.errors import BatchError, LogitsError, ShapeError, TaskError, VocabularyError
from fxdistill.models.tap import Tower
from fxdistill.objective.tokens import Batch
from fxdistill.taps.markers import check
from fxdistill.taps.table import active

PADDING_LIMIT = 0.05


@check
def require_one_grid(labels: Tensor, logits: Tensor) -> None:
    """Raise BatchError where labels have the logits' grid in one call, and not in another.

    Sizes alone tell it, and labels of another grid are as many as predictions by chance.
    """
    if (table := active()) is None:
        return
    apart, before = labels.shape != logits.shape[:-1], table.expected.labels_apart
    table.labels_apart = apart
    if before is None or before == apart:
        return
    here, there = ("another grid than", "the grid of") if apart else ("the grid of", "another than")
    raise BatchError(
        f"labels {shown(labels.shape)} have {here} the student's logits {shown(logits.shape)}, and "
        f"in the first call they had {there} these. Sizes agree by chance: if a label_loss of your "
        "own takes labels of any grid (CTC), say so by loss.aligns_labels = True; if labels are "
        "those of the predictions, bring them to the logits' length."
    )


def named_model(tower: Tower) -> str:
    """A model by its place, for errors: ``the student``, ``student0``, ``teacher big``."""
    if tower in ("student", "teacher"):
        return f"the {tower}"
    return tower if tower.rstrip("0123456789") in ("student", "teacher") else f"teacher {tower}"


def shared_vocabulary(
    student: Tensor, teacher: Tensor, vocab_size: int | None, names: tuple[str, str]
) -> tuple[Tensor, Tensor]:
    """Cut both logits to the shared entries: the padding behind them gets probability zero.

    ``vocab_size`` is the number of shared entries; ``None`` takes the smaller vocabulary. Errors
    call both by ``names``.
    """
    require_vocabulary(student, teacher, vocab_size, names)
    size = min(student.shape[-1], teacher.shape[-1]) if vocab_size is None else vocab_size
    if student.shape[-1] != size:
        student = student[..., :size]
    if teacher.shape[-1] != size:
        teacher = teacher[..., :size]
    return student, teacher


@check
def require_vocabulary(
    student: Tensor, teacher: Tensor, vocab_size: int | None, names: tuple[str, str]
) -> None:
    """Raise where logits differ in a leading axis, or in the vocabulary by more than padding."""
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ShapeError(
            f"{names[0]}'s logits are {shown(student.shape)}, {names[1]}'s "
            f"{shown(teacher.shape)}: they must agree in all but the vocabulary."
        )
    require_padding_only(student.shape[-1], teacher.shape[-1], vocab_size, names)


def require_padding_only(
    v_s: int, v_t: int, vocab_size: int | None, names: tuple[str, str]
) -> None:
    """Raise VocabularyError where two vocabularies differ by more than padding columns."""
    if differ_by_padding(v_s, v_t, vocab_size):
        return
    ours, theirs = names
    if vocab_size is not None:
        raise VocabularyError(
            f"vocab_size={vocab_size}, but {ours} has {number(v_s)} columns and {theirs} "
            f"{number(v_t)}."
        )
    raise VocabularyError(
        f"{ours}'s vocabulary has {number(v_s)} entries and {theirs}'s {number(v_t)}: more than "
        "padding. If they do share their first entries, say how many are real: vocab_size=...; "
        "if the tokenizers differ, use logit_loss=None."
    )


def differ_by_padding(a: int, b: int, vocab_size: int | None) -> bool:
    """Whether two vocabularies may be one but for padding columns behind its entries."""
    if vocab_size is not None:
        return vocab_size <= min(a, b)
    return abs(a - b) <= PADDING_LIMIT * max(a, b)


@check
def require_vocabulary_last(logits: Tensor, task: str | None) -> None:
    """Raise LogitsError where the last axis cannot be the vocabulary that the losses expect."""
    tokens = task in ("causal_lm", "masked_lm", "seq2seq")
    if logits.ndim >= 4 or logits.ndim < (3 if tokens else 2):
        raise LogitsError(
            f"the student's logits are {shown(logits.shape)}, and the losses take [B, L, V] or "
            "[B, C], the vocabulary or the classes last"
            + (f" (task {task!r})." if tokens else ".")
            + " Wrap the model so that it returns that, or give losses of your own: "
            "logit_loss=f(student, teacher, *, temperature, weights)."
        )


@check
def require_numbers_of_classes(labels: Tensor | None) -> None:
    """Raise BatchError where labels are not class or token indices."""
    if labels is not None and labels.is_floating_point():
        raise BatchError(
            f"labels are {labels.dtype}, and cross entropy takes the numbers of tokens or classes: "
            "labels.long(), or a label_loss of your own for other targets."
        )


def require_task(task: str | None, logits: Tensor, batch: Batch) -> None:
    """Raise where the batch has token-indexed tensors and no task aligns them with the logits."""
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
    """Raise TaskError where a token-indexed tensor is given without a task to align it.

    The task says which position predicts which token.
    """
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
