"""What a step reaches by gradients, and what it writes to, by name.

AOTAutograd keeps the order of what a graph is called with: the backward returns a gradient, or
nothing, for each of them, and what is written in place is copied back to its own at the end of the
forward.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxdistill.graph.halves import Halves
from fxdistill.graph.program import output_values
from fxdistill.objective.call import Call
from fxdistill.report.read.inputs import tensors_of
from fxdistill.report.read.warnings import few

if TYPE_CHECKING:
    from fxdistill.distiller.distiller import Distiller


def warnings_of(distiller: "Distiller", call: Call, halves: Halves) -> list[str]:
    """What of that is likely a mistake."""
    if not _in_order(halves):
        return []
    return [
        *_unreached(distiller, halves),
        *_writes_to_teacher(distiller, halves),
        *_writes_to_inputs(call, halves),
    ]


def notes_of(distiller: "Distiller", halves: Halves) -> list[str]:
    """What of that works and may surprise."""
    if _in_order(halves):
        return list(_writes_to_student(distiller, halves))
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


def learning(distiller: "Distiller", halves: Halves) -> dict[str, Tensor]:
    """The parameters that get a gradient, by name; all that are trained where it is not known."""
    trained = dict(_trained(distiller))
    if not _in_order(halves):
        return trained
    given = zip(halves.inputs, output_values(halves.backward.graph), strict=True)
    reached = {id(value) for value, gradient in given if isinstance(gradient, fx.Node)}
    return {name: p for name, p in trained.items() if id(p) in reached}


def _unreached(distiller: "Distiller", halves: Halves) -> Iterator[str]:
    """Trainable parameters that no term reaches."""
    trained, reached = dict(_trained(distiller)), learning(distiller, halves)
    missing = [name for name in trained if name not in reached]
    if missing:
        yield (
            f"{len(missing)} of {len(trained)} trainable parameters get no gradient in this step: "
            f"{few(missing)}"
        )


def _writes_to_teacher(distiller: "Distiller", halves: Halves) -> Iterator[str]:
    """Buffers of a frozen teacher that its forward writes to."""
    if distiller.plan.freeze_teacher and (names := _written(distiller.teacher, halves)):
        yield (
            f"the teacher writes to its own {few(names)} in every step: its targets change as it "
            "goes"
        )


def _writes_to_inputs(call: Call, halves: Halves) -> Iterator[str]:
    """Tensors of the caller that a model writes to."""
    written = _written_here(halves)
    if names := [name for name, value in tensors_of(call).items() if id(value) in written]:
        yield (
            f"a model writes to what it is called with, {few(names)}: yours is changed after the "
            "step, and the model that runs second reads what the first has written"
        )


def _writes_to_student(distiller: "Distiller", halves: Halves) -> Iterator[str]:
    """Buffers of what learns that a step writes to, as batch norm does."""
    names = [f"student {name}" for name in _written(distiller.student, halves)]
    if not distiller.plan.freeze_teacher:
        names += [f"teacher {name}" for name in _written(distiller.teacher, halves)]
    if names:
        yield f"each step in this mode writes to buffers: {few(names)}"


def _trained(distiller: "Distiller") -> Iterator[tuple[str, Tensor]]:
    towers = ("student", "projections", *(() if distiller.plan.freeze_teacher else ("teacher",)))
    for tower in towers:
        for name, value in getattr(distiller, tower).named_parameters():
            if value.requires_grad:
                yield f"{tower} {name}", value


def _written(model: torch.nn.Module, halves: Halves) -> list[str]:
    written = _written_here(halves)
    held = (*model.named_parameters(), *model.named_buffers())
    return [name for name, value in held if id(value) in written]


def _written_here(halves: Halves) -> set[int]:
    """What is copied back to, by identity."""
    graph = halves.forward.graph
    given: dict[Any, Any] = dict(zip(_given(halves), halves.inputs, strict=True))
    copies = graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    return {id(given[node.args[0]]) for node in copies if node.args[0] in given}
