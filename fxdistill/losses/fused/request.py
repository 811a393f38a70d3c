"""What a call of the fused head asks for, checked and turned into the operator's arguments."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxdistill.base.figures import shown
from fxdistill.errors import OptionError, ShapeError
from fxdistill.losses.fused.call import HeadSide, HeadTerms
from fxdistill.losses.fused.chunk import ChunkSpec
from fxdistill.losses.reduce import IGNORE


class HeadRequest(NamedTuple):
    """The arguments as the caller gave them; ``numbers`` are both weights and τ."""

    labels: Tensor | None
    weights: Tensor | None
    num_items: float | Tensor | None
    logit_weights: Tensor | None
    logit_items: float | Tensor | None
    numbers: tuple[float | Tensor, ...]
    spec: ChunkSpec
    chunk: int | None
    compiled: bool


def kept_tokens(
    student: HeadSide, teacher: HeadSide | None, asked: HeadRequest, keep: tuple[int, int]
) -> tuple[HeadSide, HeadSide | None, HeadRequest]:
    """The tokens that have a weight, in their order, filled up with some that have none."""
    assert asked.logit_weights is not None
    weights = asked.logit_weights.flatten()
    count = (weights.shape[0] * keep[0] + keep[1] - 1) // keep[1]
    at = (weights != 0).int().sort(descending=True, stable=True).indices[:count]

    def taken(side: HeadSide) -> HeadSide:
        return side._replace(hidden=side.hidden.flatten(0, -2).index_select(0, at))

    some = weights.index_select(0, at)
    asked = asked._replace(weights=some, logit_weights=some)
    return taken(student), None if teacher is None else taken(teacher), asked


def flat(side: HeadSide) -> HeadSide:
    """The side with its tokens in one axis."""
    return side._replace(hidden=side.hidden.flatten(0, -2))


def terms_of(asked: HeadRequest, h: Tensor) -> HeadTerms:
    """Turn the arguments into tensors with one entry for each token of ``h`` ``[tokens, ...]``."""
    kind = torch.float64 if h.dtype == torch.float64 else torch.float32

    def share(weights: Tensor | None, items: float | Tensor | None, flat: Tensor | None) -> Tensor:
        """The share w / Σw of each token, of those whose label is given."""
        w = h.new_ones(h.shape[0], dtype=kind) if weights is None else weights.flatten().to(kind)
        w = w if flat is None else w * (flat != IGNORE)
        total = w.sum() if items is None else _number(items, h.device, kind)
        return w / torch.where(total == 0, torch.ones_like(total), total)

    of_logits, of_labels = share(asked.logit_weights, asked.logit_items, None), None
    labels = None
    if asked.labels is not None:
        flat = asked.labels.flatten()
        of_labels = share(asked.weights, asked.num_items, flat)
        labels = torch.where(flat == IGNORE, 0, flat)
    shares = (of_logits, torch.zeros_like(of_logits) if of_labels is None else of_labels)
    settings = _settings(asked.numbers, h)
    return HeadTerms(labels, shares, settings, asked.spec, asked.chunk, asked.compiled)


def _settings(numbers: tuple[float | Tensor, ...], h: Tensor) -> Tensor:
    """The weights of both terms and τ, on the device and in the precision of the loss."""
    kind = torch.float64 if h.dtype == torch.float64 else torch.float32
    return torch.stack([_number(value, h.device, kind) for value in numbers])


def _number(value: float | Tensor, device: torch.device, kind: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(device=device, dtype=kind).reshape(())
    return torch.full((), float(value), device=device, dtype=kind)


def check_shapes(
    h: Tensor,
    w: Tensor,
    t: Tensor | None,
    t_weight: Tensor | None,
    labels: Tensor | None,
    weights: Tensor | None,
    logit_weights: Tensor | None = None,
) -> None:
    """Raise ShapeError where hidden states, weights, labels and weights of tokens do not fit."""
    heads = [("student", h, w)]
    if t is not None and t_weight is not None:
        heads.append(("teacher", t, t_weight))
    for tower, hidden, weight in heads:
        check_head(f"{tower}_", hidden, weight)
    grid = h.shape[:-1]
    given = {"teacher_hidden": None if t is None else t.shape[:-1]}
    given["labels"] = None if labels is None else labels.shape
    given["weights"] = None if weights is None else weights.shape
    given["logit_weights"] = None if logit_weights is None else logit_weights.shape
    for name, shape in given.items():
        if shape is not None and shape != grid:
            raise ShapeError(f"{name} has {shown(shape)} tokens, student_hidden {shown(grid)}")


def check_head(whose: str, hidden: Tensor, weight: Tensor) -> None:
    """Raise ShapeError unless hidden states fit the weight of their head."""
    if weight.ndim != 2 or hidden.ndim < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"{whose}hidden is {shown(hidden.shape)} and {whose}weight {shown(weight.shape)}: "
            "[..., D] and [V, D]"
        )


def check_bias(whose: str, bias: Tensor | None, weight: Tensor | None) -> None:
    """Raise ShapeError unless a bias has a number for each row of the weight of its head."""
    if bias is not None and weight is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(
            f"{whose}bias is {shown(bias.shape)} and {whose}weight {shown(weight.shape)}: [V] and "
            "[V, D]"
        )


def cap_of(value: float | None) -> float | None:
    """A softcap as a number, if there is one."""
    return None if value is None else float(value)


def require_constants(*values: Any) -> None:
    """Raise OptionError if a value requires a gradient: only hidden states and heads get one."""
    if torch.is_grad_enabled():
        for value in values:
            if isinstance(value, Tensor) and value.requires_grad:
                raise OptionError(
                    "weights, items, temperature and the weights of terms get no gradient from the "
                    "fused head: detach() them, or use the losses of logits"
                )
