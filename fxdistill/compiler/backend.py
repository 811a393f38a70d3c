"""The ``torch.compile`` backend: split, expose, compose, passes, lower."""

import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx
from torch._dynamo.utils import get_metrics_context

from fxdistill.compiler.compose import compose
from fxdistill.compiler.journal import Past
from fxdistill.compiler.lower import Lowering, lower
from fxdistill.compiler.split import split
from fxdistill.distiller.options import Plan
from fxdistill.errors import OptionError
from fxdistill.graph import pipeline
from fxdistill.graph.halves import Halves
from fxdistill.graph.joint import JointProgram
from fxdistill.graph.pipeline import Dump, Observer
from fxdistill.graph.program import Pass, PassRecord, Program, output_values
from fxdistill.passes import ExposeOutputs, FuseHead, PackReductions, PruneTeacher
from fxdistill.taps.markers import CHECKS, LOCAL, begin, handed_on


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
