"""Capture one step as one graph. The only file that knows dynamo.

The step is traced by ``torch.compile`` with a backend of our own: guards, recompilation, dynamic
shapes, autocast and mutation are dynamo's. The backend cuts the graph into programs, runs the
passes, composes and lowers. Private to torch and used here only: the exceptions of
``torch._dynamo.exc``, which become ours; and dynamo's metrics, which say why a graph is made anew
(if they move, a report tells no recompiles).
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
from fxdistill.compiler.explain import explained
from fxdistill.compiler.journal import Journal
from fxdistill.compiler.split import split
from fxdistill.errors import FxDistillError
from fxdistill.graph.halves import Halves
from fxdistill.graph.joint import JointProgram
from fxdistill.graph.program import Program
from fxdistill.models.tap import Tap
from fxdistill.taps.hooks import hooked
from fxdistill.taps.markers import begin
from fxdistill.taps.table import TapTable, recording

Traced = Callable[..., Any]
RECOMPILE_LIMIT = 32


def one_graph(step: Traced, recipe: Recipe, dynamic: bool | None = None) -> Traced:
    """``step`` as one compiled graph."""
    own = own_code(step)
    compiled = torch.compile(
        own, backend=functools.partial(backend, recipe=recipe), fullgraph=True, dynamic=dynamic
    )
    return functools.partial(_call, compiled)


def _call(compiled: Traced, table: TapTable, *args: Any) -> Any:
    """Call, and turn dynamo's exceptions into what happened."""
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
        if isinstance(inner, (FxDistillError, Captured)):
            raise inner from None
        raise explained(error) from error


@contextlib.contextmanager
def _dynamo_settings() -> Iterator[None]:
    """What a step needs of dynamo, for the time of a call.

    A training loop comes in more forms than dynamo's default of 8 (with labels, with masks, train,
    eval, sizes of 1, ...). And transformers logs once for each message, through a cache that dynamo
    would refuse to trace; such a message is not repeated in a graph.
    """
    config: Any = torch._dynamo.config
    once = [getattr(logging.Logger, name, None) for name in ("warning_once", "info_once")]
    quiet = {*config.ignore_logger_methods, *(method for method in once if method is not None)}
    limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    # In DDP, dynamo would cut the graph into buckets before we see it.
    with config.patch(recompile_limit=limit, ignore_logger_methods=quiet, optimize_ddp=False):
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
    """As ``dry_run``, on to where AOTAutograd has cut the step; ``None`` if nothing learns."""
    journal, cut = Journal(), list[Halves]()

    def stop(halves: Halves) -> None:
        cut.append(halves)
        raise Captured

    compiled = one_graph(step, replace(recipe, dry=True, watch=stop).noting(journal))
    try:
        # A cached graph would not be cut again.
        with functorch_config.patch(enable_autograd_cache=False):
            compiled(table, *args)
    except Captured:
        assert journal.program is not None
        return journal.program, cut[0] if cut else None
    finally:
        cut.clear()  # dynamo never frees a backend
    raise AssertionError("a dry run ends in the backend")


def dry_values(run: Callable[..., Any], table: TapTable, *args: Any) -> None:
    """Trace ``run`` and execute nothing: ``table`` then holds stand-ins with the taps' shapes."""

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
    make any of their outputs an output of the graph. Parameters are placeholders; nothing is
    executed.
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
