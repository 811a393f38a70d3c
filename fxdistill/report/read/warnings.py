"""Warnings: things that are likely mistakes, found before the first step."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.dropout import _DropoutNd

from fxdistill.losses.reduce import IGNORE
from fxdistill.objective.call import Call
from fxdistill.report.subject import Subject


def warnings_of(subject: Subject, call: Call | None) -> tuple[str, ...]:
    """The warnings from models and inputs, then those that earlier calls gave."""
    batch = () if call is None else _batch(subject, call)
    return (*_models(subject), *batch, *subject.warnings)


def _models(subject: Subject) -> Iterator[str]:
    for tower in sorted(subject.objective.compared):
        dropping = [
            name
            for name, module in subject.models[tower].named_modules()
            if isinstance(module, _DropoutNd) and module.training and module.p > 0
        ]
        if dropping:
            yield f"the {tower} drops values at random in {few(dropping)}: its targets are noise"
    for term in subject.objective.features:
        if term.projection is not None and not any(
            p.requires_grad for p in subject.projections[term.projection].parameters()
        ):
            yield f"the projection of {term.name} is frozen: it stays as it was made"
    for tower, model in subject.models.items():
        if tower not in subject.frozen and not any(p.requires_grad for p in model.parameters()):
            yield f"nothing of the {tower} learns: no parameter of it requires a gradient"


def _batch(subject: Subject, call: Call) -> Iterator[str]:
    labels = call.batch.labels
    some = _is_real(labels) and labels is not None and labels.numel() > 0
    if some and labels is not None and bool((labels == IGNORE).all()):
        yield f"every label is {IGNORE}: label and logit terms are 0"
    ids = call.inputs[subject.main].kwargs.get("input_ids")
    pad = _padding(subject.models[subject.main])
    unmasked = _is_real(ids) and pad is not None and call.batch.attention_mask is None
    rows = unmasked and ids is not None and ids.ndim == 2 and ids.shape[1] > 0
    if rows and ids is not None and bool((ids[:, [0, -1]] == pad).any()):
        yield (
            f"rows of input_ids begin or end with the padding token {pad} and there is no "
            "attention_mask: padding counts as tokens"
        )


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor) and not value.is_meta


def _padding(model: nn.Module) -> int | None:
    found = getattr(getattr(model, "config", None), "pad_token_id", None)
    return found if isinstance(found, int) else None


def few(names: list[str]) -> str:
    """Up to three of the names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
