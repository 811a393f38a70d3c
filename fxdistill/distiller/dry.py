"""Learn about a step without computing it: for checks, for reports, for widths and tokens."""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from fxdistill.base.tensors import is_placed
from fxdistill.compiler import capture
from fxdistill.compiler.backend import Recipe
from fxdistill.distiller.modes import Request, Steps, captured_warm, tapping
from fxdistill.distiller.step import run_towers, step
from fxdistill.errors import StepError
from fxdistill.graph.halves import Halves
from fxdistill.graph.joint import JointProgram
from fxdistill.models.tap import Tap, Tower
from fxdistill.taps.attention import values_of
from fxdistill.taps.table import TapTable


def captured(
    request: Request, steps: Steps, recipe: Recipe, *, cut: bool
) -> tuple[JointProgram, Halves | None, TapTable]:
    """Capture a step; with ``cut``, also partition it into forward and backward."""
    call = request.call
    given = (request.towers, request.objective, call.inputs, call.batch, request.settings)
    run = capture.dry_halves if cut else capture.dry_run
    with tapping(request, steps, capturing=True) as table:
        found = captured_warm(request.towers, lambda: run(step, recipe, table, *given))
        return *found, table


def tapped_shapes(request: Request, steps: Steps) -> Mapping[tuple[Tower, Tap], Tensor]:
    """The shapes of all matched values, as meta tensors; modules that do not run are left out."""
    request = _of_shapes(request)
    objective = request.objective
    with tapping(request, steps, capturing=True) as table:
        given = (request.towers, objective, request.call.inputs)
        captured_warm(request.towers, lambda: capture.dry_values(run_towers, table, *given))
    return {
        end: torch.empty([int(size) for size in value.shape], device="meta")
        for end, value in values_of(table).items()
    }


def fake_values(request: Request, steps: Steps) -> Mapping[tuple[Tower, Tap], Tensor]:
    """All matched values as fake tensors, from running the models on fake inputs as they are.

    The code of the models runs, without graphs and without computing anything. Parameters, buffers,
    attributes and random numbers stay as they are, and torch logs no error. Raises what the models
    raise where data decides, and StepError where they may communicate: a hook would gather fake
    parameters for good.
    """
    values, error = values_until_error(request, steps)
    if error is not None:
        raise error
    return values


def is_fake(request: Request) -> bool:
    """Whether there are no real models to run, as in a report of models without weights."""
    held = [p for model in request.towers.modules.values() for p in model.parameters()]
    inputs = tree_leaves([tuple(given) for given in request.call.inputs.values()])
    tensors = [x for x in (*held, *inputs) if isinstance(x, Tensor)]
    return any(isinstance(x, FakeTensor) or x.is_meta for x in tensors)


def values_until_error(
    request: Request, steps: Steps
) -> tuple[Mapping[tuple[Tower, Tap], Tensor], Exception | None]:
    """As ``fake_values``, with what the models raise beside the values that they gave before."""
    if _may_communicate(request.towers.modules.values()):
        return {}, StepError("the models communicate with other ranks")
    request = _of_shapes(request)
    objective = request.objective
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, _without_log(), _for_shapes(request.towers.modules.values(), mode):
        inputs = tree_map(lambda x: _like(x, mode), dict(request.call.inputs))
        error = None
        with tapping(request, steps, capturing=True) as table:
            try:
                run_towers(request.towers, objective, inputs)
            except Exception as raised:  # of the models' own code
                error = raised
        return values_of(table), error


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """Keep torch from logging what fails on fake tensors: that is an answer here, and no fault."""

    def nothing(record: logging.LogRecord) -> bool:
        return False

    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addFilter(nothing)
    try:
        yield
    finally:
        log.removeFilter(nothing)


def _may_communicate(models: Iterable[nn.Module]) -> bool:
    """Whether parameters lie on several ranks, or a wrapper in the models joins ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return any(
        hasattr(m, "process_group") or any(is_placed(p) for p in m._parameters.values())
        for model in models
        for m in model.modules()
    )


def _of_shapes(request: Request) -> Request:
    """The step without terms on logits; where a head makes its own, they tell how many classes."""
    objective = request.objective
    made = (head.student for head in objective.heads if head.has_module)
    if (needed := next(made, None)) is not None:
        objective = replace(objective, returns=needed, returns_if_any=False)
    objective = replace(objective, logits=(), labels=())
    return replace(request, objective=objective)


def _like(value: Any, mode: FakeTensorMode) -> Any:
    return mode.from_tensor(value) if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _for_shapes(models: Iterable[nn.Module], mode: FakeTensorMode) -> Iterator[None]:
    """Let the models have fake buffers and be in eval mode; restore all of their attributes.

    A step may count in its buffers, put others in their place, or keep a tensor for the next one.
    Hooks that the models have are off, because they may keep what they see.
    A model's first run may put hooks into it, and note that in an attribute: both go, or the next
    run would put them in again. In train mode some models choose at random what they mask, on the
    host.
    """
    modules = [m for model in models for m in model.modules()]
    before = [(m, dict(vars(m)), _tables(m)) for m in modules]
    try:
        for module in modules:
            module.training = False
            for hooks in _hook_tables(module):  # of the user's own: they may collect what they see
                hooks.clear()
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else mode.from_tensor(buffer)
        yield
    finally:
        torch.clear_autocast_cache()  # it may hold fake casts of real weights
        for module, attributes, tables in before:
            vars(module).clear()
            vars(module).update(attributes)
            for table, content in tables:
                table.clear()
                table.update(content)


def _hook_tables(module: Any) -> list[dict[int, Any]]:
    """The tables of hooks around a module's forward."""
    before = [module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs]
    after = [module._forward_hooks, module._forward_hooks_with_kwargs]
    return [*before, *after, module._forward_hooks_always_called]


def _tables(module: nn.Module) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    """The tables of a module (of buffers, hooks, ...), each with what is in it now."""
    return [(table, dict(table)) for table in vars(module).values() if isinstance(table, dict)]
