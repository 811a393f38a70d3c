"""The tensors that a step is called with, by name."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from fxdistill.models.tap import Tower
from fxdistill.objective.call import Call, Inputs
from fxdistill.objective.tokens import TOKEN_FIELDS

_OF_TERMS = (*TOKEN_FIELDS, "num_items", "num_items_in_batch", "num_feature_items")


def tensors_of(call: Call, main: Tower) -> dict[str, Tensor]:
    """The tensors of the main model, of the terms, and of other models only (``teacher_inputs``).

    The name of a tensor in a mapping or a list is its path there: ``batch.input_ids``.
    """
    ours = dict(_named(call.inputs[main]))
    terms = {name: getattr(call.batch, name) for name in _OF_TERMS}
    known = {id(value) for value in ours.values()}
    theirs = {
        f"{tower}_inputs.{name}": value
        for tower, inputs in call.inputs.items()
        if tower != main
        for name, value in _named(inputs)
        if id(value) not in known
    }
    return {**ours, **{name: x for name, x in terms.items() if isinstance(x, Tensor)}, **theirs}


def _named(inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    for i, value in enumerate(inputs.args):
        yield from _within(f"argument {i}", value)
    for name, value in inputs.kwargs.items():
        yield from _within(name, value)


def _within(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _within(f"{name}.{key}", inner)
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _within(f"{name}.{i}", inner)
