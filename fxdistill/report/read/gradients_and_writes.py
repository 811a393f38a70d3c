"""Which parameters get a gradient in a step, and which tensors it writes to, by name.

AOTAutograd keeps the order of a graph's inputs: the backward returns a gradient or ``None`` for
each of them, and the forward ends by copying into those that the step writes in place.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fxdistill.graph.halves import Halves
from fxdistill.graph.program import output_values
from fxdistill.objective.call import Call
from fxdistill.report.read.inputs import tensors_of
from fxdistill.report.read.warnings import few
from fxdistill.report.subject import Subject


def warnings_of(subject: Subject, call: Call, halves: Halves) -> list[str]:
    """Warnings about parameters without gradients and about writes that are likely mistakes."""
    if not _in_order(halves):
        return []
    return [
        *_unreached(subject, halves),
        *_writes_to_frozen(subject, halves),
        *_writes_to_inputs(subject, call, halves),
    ]


def notes_of(subject: Subject, halves: Halves) -> list[str]:
    """Notes on writes that work and may surprise."""
    if _in_order(halves):
        return list(_writes_to_learning(subject, halves))
    return [
        "AOTAutograd has made other inputs of the step's: which parameters get no gradient, and "
        "what is written, is not known"
    ]


def _in_order(halves: Halves) -> bool:
    gradients = output_values(halves.backward.graph)
    return len(halves.inputs) == len(_given(halves)) == len(gradients)


def _given(halves: Halves) -> list[fx.Node]:
    """The inputs of the forward, without the states of random operators that torch adds."""
    inputs = halves.forward.graph.find_nodes(op="placeholder")
    return [node for node in inputs if not node.name.startswith("fwd_rng_state")]


def learning(subject: Subject, halves: Halves) -> dict[str, Tensor]:
    """The parameters that get a gradient, by name; all trainable ones where that is unknown."""
    trained = dict(_trained(subject))
    if not _in_order(halves):
        return trained
    given = zip(halves.inputs, output_values(halves.backward.graph), strict=True)
    reached = {id(value) for value, gradient in given if isinstance(gradient, fx.Node)}
    return {name: p for name, p in trained.items() if id(p) in reached}


def _unreached(subject: Subject, halves: Halves) -> Iterator[str]:
    """A warning about trainable parameters that no term reaches."""
    trained, reached = dict(_trained(subject)), learning(subject, halves)
    missing = [name for name in trained if name not in reached]
    if missing:
        yield (
            f"{len(missing)} of {len(trained)} trainable parameters get no gradient in this step: "
            f"{few(missing)}"
        )


def _writes_to_frozen(subject: Subject, halves: Halves) -> Iterator[str]:
    """Warnings about buffers of a frozen model that its forward writes to."""
    for tower in subject.models:
        if tower in subject.frozen and (names := _written(subject.models[tower], halves)):
            yield (
                f"the {tower} writes to its own {few(names)} in every step: its targets change as "
                "it goes"
            )


def _writes_to_inputs(subject: Subject, call: Call, halves: Halves) -> Iterator[str]:
    """A warning about the caller's tensors that a model writes to."""
    written = _written_here(halves)
    tensors = tensors_of(call, subject.main)
    if names := [name for name, value in tensors.items() if id(value) in written]:
        yield (
            f"a model writes to what it is called with, {few(names)}: yours is changed after the "
            "step, and the model that runs second reads what the first has written"
        )


def _writes_to_learning(subject: Subject, halves: Halves) -> Iterator[str]:
    """A note on buffers of trained models that a step writes to, as batch norm does."""
    learning = [name for name in subject.learning if name in subject.models]
    names = [
        f"{tower} {name}" for tower in learning for name in _written(subject.models[tower], halves)
    ]
    if names:
        yield f"each step in this mode writes to buffers: {few(names)}"


def _trained(subject: Subject) -> Iterator[tuple[str, Tensor]]:
    for name in subject.learning:
        for path, value in subject.parts[name].named_parameters():
            if value.requires_grad:
                yield f"{name} {path}", value


def _written(model: torch.nn.Module, halves: Halves) -> list[str]:
    written = _written_here(halves)
    held = (*model.named_parameters(), *model.named_buffers())
    return [name for name, value in held if id(value) in written]


def _written_here(halves: Halves) -> set[int]:
    """The ids of the tensors that the forward copies into at its end."""
    graph = halves.forward.graph
    given: dict[Any, Any] = dict(zip(_given(halves), halves.inputs, strict=True))
    copies = graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    return {id(given[node.args[0]]) for node in copies if node.args[0] in given}
