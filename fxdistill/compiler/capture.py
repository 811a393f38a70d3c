"""Capture one step as one graph.

``torch.compile`` traces the step, with our backend: dynamo takes care of guards, recompilation,
dynamic shapes, autocast and mutation. The backend cuts the graph into programs, runs the passes,
composes and lowers. Private to torch: the exceptions of ``torch._dynamo.exc``, which this file and
``explain`` turn into ours; and dynamo's metrics, from which ``backend`` reads why it compiles again
(if they move, reports list no recompiles); and ``obj_weakref`` of a guard, which only logs read (if
it moves, torch 2.11 cannot capture models with a cache).
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import exc
from torch._functorch import config as functorch_config

from fxdistill.base.nodes import own_code
from fxdistill.compiler.backend import Captured, Recipe, backend
from fxdistill.compiler.explain import explained, is_of_compiling, own_cause
from fxdistill.compiler.journal import Journal
from fxdistill.compiler.split import split
from fxdistill.compiler.waiting import waiting
from fxdistill.errors import FxDistillError
from fxdistill.graph.halves import Halves
from fxdistill.graph.joint import JointProgram
from fxdistill.graph.program import Program
from fxdistill.models.flex_masks import traceable_masks
from fxdistill.models.tap import Tap
from fxdistill.taps.hooks import hooked
from fxdistill.taps.markers import begin
from fxdistill.taps.table import TapTable, recording

Traced = Callable[..., Any]
RECOMPILE_LIMIT = 32


def one_graph(
    step: Traced, recipe: Recipe, dynamic: bool | None = None, constant: str = ""
) -> Traced:
    """Compile ``step`` as one graph.

    Every call is given the same, unchanging value for its argument called ``constant``: dynamo need
    not compare all that is in it before each step.
    """

    def kept(guards: Sequence[Any]) -> list[bool]:
        for guard in guards:
            # Dynamo makes the kept guards once more. torch 2.11 refuses that for an object which
            # is another one at each access, such as what transformers' config of a cache returns.
            guard.orig_guard.obj_weakref = None
        return [not guard.orig_guard.name.startswith(f"L['{constant}']") for guard in guards]

    compiled = torch.compile(
        own_code(step),
        backend=functools.partial(backend, recipe=recipe),
        fullgraph=True,
        dynamic=dynamic,
        options={"guard_filter_fn": kept} if constant else None,
    )
    return _OneGraph(compiled)


class _OneGraph:
    """A compiled step; the first call, which makes the graph, says that it takes its time."""

    def __init__(self, compiled: Traced) -> None:
        self.compiled = compiled
        self.made = False

    def __call__(self, table: TapTable, *args: Any) -> Any:
        if self.made or torch.compiler.is_compiling():  # a user may compile the distiller itself
            return _call(self.compiled, table, *args)
        with waiting("capturing the step"):
            result = _call(self.compiled, table, *args)
        self.made = True
        return result


def _call(compiled: Traced, table: TapTable, *args: Any) -> Any:
    """Call the step, and turn dynamo's exceptions into ours, which say what happened."""
    table.failure = None
    try:
        with _dynamo_settings():
            return compiled(*args)
    except FxDistillError:
        raise
    except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:
        if table.failure is not None:
            raise table.failure from None
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, Captured):
            raise inner from None
        if (ours := own_cause(error)) is not None:
            raise ours from None
        raise explained(error, table.section) from error
    except Exception as error:
        # Some errors of torch's own (sizes that depend on data, say) leave dynamo as they are.
        if not is_of_compiling(error):
            raise
        raise (table.failure or explained(error, table.section)) from error


@contextlib.contextmanager
def _dynamo_settings() -> Iterator[None]:
    """The settings of dynamo that a step needs, for the duration of a call.

    A training loop has more kinds of calls than dynamo's default limit of 8 (with labels, with
    masks, train, eval, sizes of 1, ...). And transformers logs each message once, through a cache
    that dynamo refuses to trace; a compiled step leaves these messages out.
    """
    config: Any = torch._dynamo.config
    once = [getattr(logging.Logger, name, None) for name in ("warning_once", "info_once")]
    quiet = {*config.ignore_logger_methods, *(method for method in once if method is not None)}
    limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    # Under DDP, dynamo would split the graph into buckets before our backend gets it.
    settings = {"recompile_limit": limit, "ignore_logger_methods": quiet, "optimize_ddp": False}
    with traceable_masks(), config.patch(**settings):
        yield


def dry_run(step: Traced, recipe: Recipe, table: TapTable, *args: Any) -> tuple[JointProgram, None]:
    """Capture ``step`` on the shapes of ``args`` and return the program; nothing is executed."""
    journal = Journal()
    compiled = one_graph(step, replace(recipe, dry=True).noting(journal))
    try:
        compiled(table, *args)
    except Captured:
        assert journal.program is not None
        return journal.program, None
    raise AssertionError("a dry run ends in the backend")


def dry_halves(
    step: Traced, recipe: Recipe, table: TapTable, *args: Any
) -> tuple[JointProgram, Halves | None]:
    """Like ``dry_run``, with the halves into which AOTAutograd cuts the step.

    The halves are ``None`` if no output depends on a trainable parameter.
    """
    journal, cut = Journal(), list[Halves]()

    def stop(halves: Halves) -> None:
        cut.append(halves)
        raise Captured

    compiled = one_graph(step, replace(recipe, dry=True, watch=stop).noting(journal))
    try:
        # AOTAutograd does not partition a graph that it finds in its cache.
        with functorch_config.patch(enable_autograd_cache=False):
            compiled(table, *args)
    except Captured:
        assert journal.program is not None
        return journal.program, cut[0] if cut else None
    finally:
        cut.clear()  # dynamo never frees the backend, which holds this list
    raise AssertionError("a dry run ends in the backend")


def dry_values(run: Callable[..., Any], table: TapTable, *args: Any) -> None:
    """Trace ``run`` without executing it: ``table`` then holds fake tensors for the taps."""

    def stop(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        raise Captured

    compiled = torch.compile(own_code(run), backend=stop, fullgraph=True)
    try:
        _call(compiled, table, *args)
    except Captured:
        return
    raise AssertionError("a capture ends in the backend")


def trace(module: nn.Module, *args: Any, **kwargs: Any) -> Program:
    """Capture one call of ``module`` as a Program, for reading and for writing passes.

    Every named submodule that runs is marked, so that ``ExposeOutputs(only=(pattern, ...))`` can
    turn the output of any of them into an output of the graph. Parameters become placeholders;
    nothing is executed. Raises CaptureError where the call cannot be captured as one graph.
    """
    programs: list[Program] = []

    def keep(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        program = split(gm)["module"]
        names = tuple(f"output_{i}" for i in range(len(program.outputs)))
        programs.append(replace(program, outputs=names))
        raise Captured

    def step(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        begin("module")
        return module(*args, **kwargs)

    compiled = torch.compile(own_code(step), backend=keep, fullgraph=True)
    taps = [Tap(path) for path, _ in module.named_modules() if path]
    with (
        recording(TapTable(capturing=True)) as table,
        hooked(module, "module", taps, required=False),
    ):
        try:
            _call(compiled, table, module, args, kwargs)
        except Captured:
            return programs[0]
    raise AssertionError("a capture ends in the backend")
