"""The ``torch.compile`` backend: split, expose, compose, passes, lower."""

import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx
from torch._dynamo.utils import get_metrics_context

from fxdistill.compiler.cached import caching_of
from fxdistill.compiler.compose import compose
from fxdistill.compiler.journal import Journal
from fxdistill.compiler.lower import Lowering, lower
from fxdistill.compiler.split import split
from fxdistill.compiler.waiting import waiting
from fxdistill.errors import OptionError
from fxdistill.graph import pipeline
from fxdistill.graph.halves import Halves
from fxdistill.graph.joint import JointProgram
from fxdistill.graph.pipeline import Dump, Observer
from fxdistill.graph.program import Pass, PassRecord, Program, output_values
from fxdistill.passes.order import Stage, Wanted, passes_at
from fxdistill.taps.markers import CHECKS, LOCAL, begin, named, note_localised


@dataclass(frozen=True)
class Recipe:
    """The lowering and the passes of a backend, and the journal in which it notes what it did.

    Dynamo never frees a backend, so a recipe must not keep a model alive: it holds the distiller's
    journal by weak reference. Dynamo cannot trace a weak reference: make the recipe outside any
    surrounding compile.
    """

    lowering: Lowering = Lowering()
    wanted: Wanted = Wanted()
    journal: Journal = field(default_factory=Journal)
    dry: bool = False
    watch: Callable[[Halves], None] | None = None  # gets the forward and backward of a dry run

    def passes(self, stage: Stage) -> tuple[Pass, ...]:
        """The passes of a stage that are wanted now: the journal's state may change them."""
        compiled = self.lowering.backend == "inductor"
        wanted = replace(self.wanted, compiled=compiled, made=self.journal.logits_made)
        return passes_at(stage, wanted)

    def noting(self, journal: Journal) -> "Recipe":
        """A copy of the recipe that writes its notes to ``journal``."""
        return replace(self, journal=weakref.proxy(journal))


class Captured(Exception):
    """Raised by the backend when only the capture was wanted."""


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    recipe: Recipe | None = None,
    **unknown: Any,
) -> Callable[..., Any]:
    """The ``torch.compile`` backend: split, expose, compose, user passes, fuse, prune, lower.

    A graph without our markers holds the terms of regional mode, which only need the fused head. Or
    it is a user's function compiled with ``backend="fxdistill"``: then it is lowered as it is.
    """
    if unknown:
        raise OptionError(
            f"the backend 'fxdistill' takes no {' and '.join(unknown)} from torch.compile: give "
            'them to wrap(..., compile={"options": ..., "mode": ...})'
        )
    if any(node.target is begin for node in gm.graph.nodes):
        return _step(gm, example_inputs, recipe or Recipe())
    return _terms(gm, example_inputs, recipe)


def _step(gm: fx.GraphModule, example_inputs: Sequence[Any], recipe: Recipe) -> Callable[..., Any]:
    """Compile a graph that holds the models and the objective."""
    dump, journal = Dump(), recipe.journal
    journal.made_graph(_why_again())
    with waiting("running passes"):
        joint = joint_program(gm, recipe, dump)
    journal.program = joint
    if recipe.dry and (recipe.watch is None or not _learns(joint)):  # no halves wanted, or none
        raise Captured
    passes, observers = recipe.passes("step"), (dump, _note(journal, joint))
    every = (*recipe.passes("each model"), *recipe.passes("joint"), *passes)
    lowering = (recipe.lowering, passes, observers, recipe.watch)
    with waiting("compiling the step"):
        caching = caching_of(joint.gm, every, wanted=not dump.root)
        compiled = lower(joint.gm, example_inputs, *lowering, caching)
    if recipe.dry:  # AOTAutograd made no backward: no output depends on a trainable parameter
        raise Captured
    return compiled


def _terms(
    gm: fx.GraphModule, example_inputs: Sequence[Any], recipe: Recipe | None
) -> Callable[..., Any]:
    """Compile a graph without models: the objective, on values of models that run as they are."""
    names = _unnamed(gm)
    terms, dump = JointProgram(gm, names, title="terms"), Dump()
    dump.write("terms", terms)
    if recipe is None:  # a user's function
        return lower(terms.gm, example_inputs, Lowering(), ())
    recipe.journal.made_graph(_why_again())
    _erase_checks(gm)
    first, passes = recipe.passes("terms"), recipe.passes("terms step")
    terms = pipeline.run(terms, first, [dump])
    recipe.journal.program = terms
    observers = (dump, _note(recipe.journal, terms))
    with waiting("compiling the terms"):
        caching = caching_of(terms.gm, (*first, *passes), wanted=not dump.root)
        return lower(terms.gm, example_inputs, recipe.lowering, passes, observers, caching=caching)


def _unnamed(gm: fx.GraphModule) -> tuple[str, ...]:
    """The names of the outputs, whose markers are taken out of the graph."""
    marks = {n: str(n.args[1]) for n in gm.graph.nodes if n.target is named}
    values = output_values(gm.graph)
    names = (marks.get(v) if isinstance(v, fx.Node) else None for v in values)
    told = tuple(name or f"output_{i}" for i, name in enumerate(names))
    for node in marks:
        node.replace_all_uses_with(node.all_input_nodes[0])
        gm.graph.erase_node(node)
    return told


def _learns(joint: JointProgram) -> bool:
    """Whether the total requires a gradient; true where its fake tensor does not tell."""
    total = output_values(joint.gm.graph)[0]
    value = total.meta.get("example_value") if isinstance(total, fx.Node) else None
    return not isinstance(value, Tensor) or value.requires_grad


def _why_again() -> str | None:
    """The guards of earlier graphs that failed; ``None`` for the first graph of a step."""
    found = get_metrics_context()._metrics.get("recompile_reason")
    # Drop the numbers of dynamo's frame and graph, which the reason begins with.
    return None if found is None else re.sub(r"^\d+/\d+: ", "", str(found))


def _note(journal: Journal, program: JointProgram) -> Observer:
    """Make an observer that adds the records of joint passes to the history of ``program``."""
    history = list(program.history)

    def note(record: PassRecord, _: Program) -> None:
        history.append(record)
        journal.program = replace(program, history=tuple(history))

    return note


def joint_program(gm: fx.GraphModule, recipe: Recipe, dump: Dump) -> JointProgram:
    """Split the captured graph, run the passes of each model, compose, and run the joint passes."""
    names = tuple(f"output_{i}" for i in range(len(output_values(gm.graph))))
    dump.write("capture", Program(gm, names, title="capture"))
    _erase_checks(gm)
    *models, objective = split(gm).items()
    passes = recipe.passes("each model")
    observers: list[Observer] = [dump]
    exposed = {name: pipeline.run(p, passes, observers) for name, p in models}
    joint = compose(gm, {**exposed, objective[0]: objective[1]})
    records = tuple(record for program in exposed.values() for record in program.history)
    joint = JointProgram(joint.gm, joint.outputs, records, title=joint.title)
    dump.write("joint_compose", joint)
    return pipeline.run(joint, recipe.passes("joint"), observers)


def _erase_checks(gm: fx.GraphModule) -> None:
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in reversed(module.graph.nodes):
                if node.op == "call_function" and node.target in CHECKS:
                    if node.target is note_localised:
                        _note_local(node)
                    module.graph.erase_node(node)


def _note_local(marker: fx.Node) -> None:
    """Mark a value that a parallel style made local: ExposeOutputs then reads its DTensor."""
    for value in marker.args:
        if isinstance(value, fx.Node) and value.target == "to_local":
            value.meta[LOCAL] = True
