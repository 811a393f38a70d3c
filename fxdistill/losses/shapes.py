"""Which shapes a loss compares. Others are errors here, since torch would broadcast many of them.

A loss that compares values of one shape asks ``require_alike``, one that has weights
``require_weights``; losses of logits are ``of_predictions``. Sizes may be symbolic: they are
compared as the arithmetic behind them would compare them, so that a graph gets no further guards.
Sizes that depend on data are left to that arithmetic.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from fxdistill.base.figures import number, shown
from fxdistill.errors import ShapeError, VocabularyError

F = TypeVar("F", bound=Callable[..., Tensor])


def differ(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two shapes are known to differ."""
    if len(one) != len(other):
        return True
    return any(guard_or_false(a != b) for a, b in zip(one, other, strict=True))


def require_alike(student: Tensor, teacher: Tensor) -> None:
    """Raise ShapeError unless both values have one shape."""
    if differ(student.shape, teacher.shape):
        raise ShapeError(
            f"the student's value is {shown(student.shape)} and the teacher's "
            f"{shown(teacher.shape)}: this loss compares values of one shape, number by number. "
            "Select, reduce or project one of them; wrap(...) does so by Match(project=..., "
            "reduce=...)"
        )


def require_weights(weights: Tensor, value: Tensor) -> None:
    """Raise ShapeError unless ``weights`` are of leading axes of ``value``, or of a map's places.

    An axis at least is left for the width.
    """
    given, shape = tuple(weights.shape), tuple(value.shape)
    leads = 0 < len(given) < len(shape) and not differ(given, shape[: len(given)])
    if not leads and not (len(shape) > 3 and not differ(given, (shape[0], *shape[2:]))):
        raise ShapeError(
            f"weights {shown(given)} of a value {shown(shape)}: they are those of its leading "
            "axes, [B] of samples or [B, L] of tokens, or [B, *places] of a map [B, C, *places]"
        )


def require_grid(name: str, of_predictions: Tensor, logits: Tensor) -> None:
    """Raise ShapeError unless there is a number for each prediction that ``logits`` make."""
    if differ(of_predictions.shape, logits.shape[:-1]):
        raise ShapeError(
            f"{name} {shown(of_predictions.shape)} of logits {shown(logits.shape)}: {name} are one "
            f"for each prediction, {shown(logits.shape[:-1])}"
        )


def require_logits(student: Tensor, teacher: Tensor) -> None:
    """Raise ShapeError for logits of other predictions, VocabularyError for other vocabularies."""
    if differ(student.shape[:-1], teacher.shape[:-1]):
        raise ShapeError(
            f"the student's logits are {shown(student.shape)} and the teacher's "
            f"{shown(teacher.shape)}: a loss compares the same predictions of both"
        )
    if differ(student.shape[-1:], teacher.shape[-1:]):
        raise VocabularyError(
            f"the student's vocabulary has {number(student.shape[-1])} entries and the "
            f"teacher's {number(teacher.shape[-1])}: compare those that they share, logits[..., :n]"
        )


def of_predictions(loss: F) -> F:
    """Let ``loss`` compare logits of one shape alone, with a weight for each prediction."""

    @functools.wraps(loss)
    def run(
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        weights: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        require_logits(student_logits, teacher_logits)
        if weights is not None:
            require_grid("weights", weights, student_logits)
        return loss(student_logits, teacher_logits, weights=weights, **options)

    return run  # type: ignore[return-value]
