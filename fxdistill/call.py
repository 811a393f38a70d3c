"""Sorting what a call brings: model inputs, and what the objective takes for itself."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxdistill.guards import device_of
from fxdistill.roles import decoder_inputs
from fxdistill.tokens import Batch

CALL_KEYWORDS = (
    "labels",
    "loss_mask",
    "token_weights",
    "num_items",
    "num_items_in_batch",
    "num_feature_items",
    "teacher_inputs",
)


@dataclass(frozen=True)
class Call:
    """One call, sorted: what goes to which model, and what stays here."""

    args: tuple[Any, ...]
    student: dict[str, Any]
    teacher: dict[str, Any]
    batch: Batch


def sort_call(
    student_model: nn.Module,
    teacher_model: nn.Module,
    task: str | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Call:
    """Sort the arguments of a call: for the student, for the teacher, for the objective.

    An encoder-decoder without ``decoder_input_ids`` gets them from the labels.
    """
    own = {key: kwargs[key] for key in CALL_KEYWORDS if kwargs.get(key) is not None}
    shared = {key: value for key, value in kwargs.items() if key not in CALL_KEYWORDS}
    labels = own.get("labels")
    student, teacher = dict(shared), {**shared, **own.get("teacher_inputs", {})}
    if task == "seq2seq" and labels is not None:
        for model, inputs in ((student_model, student), (teacher_model, teacher)):
            if inputs.get("decoder_input_ids") is None:
                inputs["decoder_input_ids"] = decoder_inputs(model, labels)
    device = device_of(student_model)
    items = own.get("num_items", own.get("num_items_in_batch"))
    feature_items = own.get("num_feature_items")
    batch = Batch(
        labels=labels,
        loss_mask=own.get("loss_mask"),
        token_weights=own.get("token_weights"),
        attention_mask=_tensor(shared.get("attention_mask")),
        num_items=None if items is None else scalar(items, device),
        num_feature_items=None if feature_items is None else scalar(feature_items, device),
        tokens=_token_grid(args, shared, own, task),
        decoder_tokens=_tensor(student.get("decoder_input_ids", labels)),
    )
    return Call(args, student, teacher, batch)


def _tensor(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def scalar(value: Any, device: torch.device) -> Tensor:
    """A 0-d tensor; a number is filled in on the device, without a copy from the host."""
    if isinstance(value, Tensor):
        return value.detach().to(device=device, dtype=torch.float32).reshape(())
    return torch.full((), float(value), device=device)


def _token_grid(
    args: tuple[Any, ...], shared: dict[str, Any], own: dict[str, Any], task: str | None
) -> Tensor | None:
    """A tensor whose leading two sizes are those of the (encoder's) tokens."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(found := shared.get(name), Tensor) and found.ndim >= 2:
            return found
    mask = shared.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask
    if (
        args
        and isinstance(args[0], Tensor)
        and args[0].ndim == 2
        and not args[0].is_floating_point()
    ):
        return args[0]
    if task in ("causal_lm", "masked_lm"):
        candidates = (own.get(name) for name in ("labels", "loss_mask", "token_weights"))
        return next((t for t in candidates if isinstance(t, Tensor)), None)
    return None
