"""Values that a loss takes or returns, which may be DTensors."""

import torch
from torch import Tensor, nn

from fxdistill import base
from fxdistill.base.figures import shown
from fxdistill.base.ranks import Ranks, shared
from fxdistill.base.tensors import is_placed
from fxdistill.errors import ShapeError
from fxdistill.losses.names import Compared, Kind
from fxdistill.objective.checks import comparison_problem
from fxdistill.taps.markers import check


def projected(projection: nn.Module, value: Tensor, ranks: Ranks | None, *more: Tensor) -> Tensor:
    """``projection(value, *more)``; the parameters stay plain tensors, equal on every rank.

    ``more`` are whole tensors without gradients.
    """
    summed = ranks is not None and ranks.projections
    if not is_placed(value) and not summed:
        return projection(value, *more)  # type: ignore[no-any-return]
    weights: dict[str, Tensor] = dict(projection.named_parameters())
    if ranks is not None and summed:
        groups, scale = ranks.groups, ranks.scale
        weights = {name: shared(weight, groups, scale) for name, weight in weights.items()}
    if is_placed(value):
        everywhere, dense = base.placement.everywhere, base.placement.dense
        weights = {name: everywhere(weight, value) for name, weight in weights.items()}
        value = dense(value)
        more = tuple(everywhere(x, value) for x in more)
    given = (value, *more)
    return torch.func.functional_call(projection, weights, given)  # type: ignore[no-any-return]


def ordinary(loss: Tensor, name: str) -> Tensor:
    """The loss as a plain scalar: a DTensor is gathered, and a partial sum is summed."""
    require_scalar(loss, name)
    return loss.full_tensor() if is_placed(loss) else loss


@check
def require_comparable(
    student: Tensor, teacher: Tensor, compares: Compared, s_name: str, t_name: str, loss: str
) -> None:
    """Raise ShapeError where a loss cannot compare the two values of a match."""
    names = (s_name, t_name, loss)
    if (problem := comparison_problem(student.shape, teacher.shape, compares, *names)) is not None:
        raise problem


_OF_VECTORS = ("cosine", "fitnet", "detection_box")


@check
def require_vectors(value: Tensor, weights: Tensor, kind: Kind, name: str) -> None:
    """Raise ShapeError where a loss of vectors is given one number for each token."""
    of_vectors = kind.name in _OF_VECTORS or kind.sees in ("samples together", "whole samples")
    if kind.named and of_vectors and weights.shape == value.shape:
        raise ShapeError(
            f"{name}: {kind.name} compares vectors, and the value {shown(value.shape)} has one "
            "number for each token. Take a loss of numbers (mse, l1, smooth_l1, l2), a value with "
            "a width, or tokens=None, for which the numbers of a sample are one vector."
        )


@check
def require_scalar(loss: Tensor, name: str) -> None:
    """Raise ShapeError where a loss is not one number: summing its entries would be a guess."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"shape {shown(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ShapeError(
            f"the loss of {name!r} returned {what}: a loss returns a scalar. Average over the "
            "tokens, by the weights it is given: (weights * value).sum() / weights.sum()."
        )
