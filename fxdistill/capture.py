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
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import exc
from torch._dynamo.utils import get_metrics_context
from torch._functorch import config as functorch_config

from fxdistill import pipeline
from fxdistill.capture_errors import explained
from fxdistill.compose import compose
from fxdistill.errors import FxDistillError, OptionError
from fxdistill.hooks import hooked
from fxdistill.lower import Halves, Lowering, lower
from fxdistill.nodes import own_code
from fxdistill.passes import ExposeOutputs, FuseHead, PackReductions, PruneTeacher
from fxdistill.past import Past
from fxdistill.pipeline import Dump, Observer
from fxdistill.plan import Plan
from fxdistill.program import JointProgram, Pass, PassRecord, Program, output_values
from fxdistill.split import split
from fxdistill.taps import CHECKS, LOCAL, Tap, TapTable, begin, handed_on, recording

Step = Callable[..., Any]
RECOMPILE_LIMIT = 32


@dataclass(frozen=True)
class Recipe:
    """What the backend does between capture and code, and where it notes what it did.

    Dynamo keeps backends for good. So a backend knows nothing that holds a model, and its notes by
    a weak reference only: they are a distiller's, which lives while it is called.
    """

    lowering: Lowering = Lowering()
    passes: tuple[Pass, ...] = ()
    fuse_head: bool = True
    past: Past = field(default_factory=Past)
    dry: bool = False
    watch: Callable[[Halves], None] | None = None  # a dry run goes on until it has been called

    @property
    def fusing(self) -> tuple[Pass, ...]:
        """The pass that fuses the head, if it is wanted."""
        compiled = self.lowering.backend == "inductor"
        return (FuseHead(compiled, self.past.logits_made),) if self.fuse_head else ()

    @classmethod
    def of(cls, plan: Plan) -> "Recipe":
        """What ``plan`` says of it."""
        return cls(plan.lowering, plan.passes, plan.fuse_head)

    def noting(self, past: Past) -> "Recipe":
        """The same, with its notes in ``past``."""
        return replace(self, past=weakref.proxy(past))


class _Captured(Exception):
    """Thrown out of the backend when only the capture was wanted."""


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    recipe: Recipe | None = None,
    **unknown: Any,
) -> Callable[..., Any]:
    """The ``torch.compile`` backend: split, expose, compose, user passes, prune, lower.

    A graph without our markers is the terms of regional mode, which need no more than the fused
    head; or something else that was compiled with ``backend="fxdistill"``, and lowered as it is.
    """
    if unknown:
        raise OptionError(
            f"the backend 'fxdistill' takes no {' and '.join(unknown)} from torch.compile: give "
            'them to wrap(..., compile={"options": ..., "mode": ...})'
        )
    given, recipe = recipe, recipe or Recipe()
    dump = Dump()
    if not any(node.target is begin for node in gm.graph.nodes):
        names = tuple(f"output_{i}" for i in range(len(output_values(gm.graph))))
        terms = JointProgram(gm, names, title="terms")
        dump.write("terms", terms)
        if given is None:
            return lower(terms.gm, example_inputs, recipe.lowering)
        recipe.past.made_graph(_why_again())
        _erase_checks(gm)
        terms = pipeline.run(terms, recipe.fusing, [dump])
        recipe.past.program = terms
        # There is no teacher in it to be kept.
        lowering = replace(recipe.lowering, joint_passes=(PackReductions(),))
        return lower(terms.gm, example_inputs, lowering, (dump, _note(recipe, terms)))
    recipe.past.made_graph(_why_again())
    joint = joint_program(gm, (*recipe.passes, *recipe.fusing, PruneTeacher()), dump)
    recipe.past.program = joint
    if recipe.dry and (recipe.watch is None or not _learns(joint)):  # there is nothing to cut
        raise _Captured
    observers = (dump, _note(recipe, joint))
    compiled = lower(joint.gm, example_inputs, recipe.lowering, observers, recipe.watch)
    if recipe.dry:  # nothing had to be cut: no output depends on what learns
        raise _Captured
    return compiled


def _learns(joint: JointProgram) -> bool:
    """Whether the total has a gradient, as far as its stand-in tells."""
    total = output_values(joint.gm.graph)[0]
    value = total.meta.get("example_value") if isinstance(total, fx.Node) else None
    return not isinstance(value, Tensor) or value.requires_grad


def _why_again() -> str | None:
    """Which guards of the graphs before did not hold; ``None`` for the first graph of a step."""
    found = get_metrics_context()._metrics.get("recompile_reason")
    # Behind the numbers of dynamo's frame and of its graph.
    return None if found is None else re.sub(r"^\d+/\d+: ", "", str(found))


def _note(recipe: Recipe, program: JointProgram) -> Observer:
    """What passes of the joint level did becomes part of the history of ``program``."""
    history = list(program.history)

    def note(record: PassRecord, _: Program) -> None:
        history.append(record)
        recipe.past.program = replace(program, history=tuple(history))

    return note


def joint_program(gm: fx.GraphModule, passes: Sequence[Pass], dump: Dump) -> JointProgram:
    """Everything that happens on the captured level."""
    names = tuple(f"output_{i}" for i in range(len(output_values(gm.graph))))
    dump.write("capture", Program(gm, names, title="capture"))
    _erase_checks(gm)
    *towers, objective = split(gm).items()
    observers: list[Observer] = [dump]
    exposed = {name: pipeline.run(p, (ExposeOutputs(),), observers) for name, p in towers}
    joint = compose(gm, {**exposed, objective[0]: objective[1]})
    records = tuple(record for program in exposed.values() for record in program.history)
    joint = JointProgram(joint.gm, joint.outputs, records, title=joint.title)
    dump.write("joint_compose", joint)
    return pipeline.run(joint, passes, observers)


def _erase_checks(gm: fx.GraphModule) -> None:
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in reversed(module.graph.nodes):
                if node.op == "call_function" and node.target in CHECKS:
                    if node.target is handed_on:
                        _note_local(node)
                    module.graph.erase_node(node)


def _note_local(marker: fx.Node) -> None:
    """What a parallel style made local: ExposeOutputs takes the DTensor behind it."""
    for value in marker.args:
        if isinstance(value, fx.Node) and value.target == "to_local":
            value.meta[LOCAL] = True


def one_graph(step: Step, recipe: Recipe, dynamic: bool | None = None) -> Step:
    """``step`` as one compiled graph."""
    own = own_code(step)
    compiled = torch.compile(
        own, backend=functools.partial(backend, recipe=recipe), fullgraph=True, dynamic=dynamic
    )
    return functools.partial(_call, compiled)


def _call(compiled: Step, table: TapTable, *args: Any) -> Any:
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
        if isinstance(inner, (FxDistillError, _Captured)):
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


def dry_run(step: Step, recipe: Recipe, table: TapTable, *args: Any) -> tuple[JointProgram, None]:
    """Capture ``step`` on the shapes of ``args`` and return the program; nothing is executed."""
    past = Past()
    compiled = one_graph(step, replace(recipe, dry=True).noting(past))
    try:
        compiled(table, *args)
    except _Captured:
        assert past.program is not None
        return past.program, None
    raise AssertionError("a dry run ends in the backend")


def dry_halves(
    step: Step, recipe: Recipe, table: TapTable, *args: Any
) -> tuple[JointProgram, Halves | None]:
    """As ``dry_run``, on to where AOTAutograd has cut the step; ``None`` if nothing learns."""
    past, cut = Past(), list[Halves]()

    def stop(halves: Halves) -> None:
        cut.append(halves)
        raise _Captured

    compiled = one_graph(step, replace(recipe, dry=True, watch=stop).noting(past))
    try:
        # A cached graph would not be cut again.
        with functorch_config.patch(enable_autograd_cache=False):
            compiled(table, *args)
    except _Captured:
        assert past.program is not None
        return past.program, cut[0] if cut else None
    finally:
        cut.clear()  # dynamo keeps backends for good
    raise AssertionError("a dry run ends in the backend")


def dry_values(run: Callable[..., Any], table: TapTable, *args: Any) -> None:
    """Trace ``run`` and execute nothing: ``table`` then holds stand-ins with the taps' shapes."""

    def stop(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        raise _Captured

    compiled = torch.compile(own_code(run), backend=stop, fullgraph=True)
    try:
        _call(compiled, table, *args)
    except _Captured:
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
        raise _Captured

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
        except _Captured:
            return programs[0]
    raise AssertionError("a capture ends in the backend")
