"""The one list of passes: which of them run at which stage, in which order, and why.

A graph goes through stages. ``each model``: the program of one model, split from the captured
graph. ``joint``: models and objective in one program. ``terms``: the objective alone, where models
run as they are. These three stages are on the captured level. ``step`` and ``terms step``: the
forward and backward of ``joint`` and ``terms``, as AOTAutograd traces them and before it partitions
them; these are on the joint level (see ``Program.level``).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fxdistill.graph.program import Pass
from fxdistill.models.tap import Tower
from fxdistill.passes.count_collectives import CountCollectives
from fxdistill.passes.expose_outputs import ExposeOutputs
from fxdistill.passes.form_gradients import FormGradients
from fxdistill.passes.fuse_head import FuseHead
from fxdistill.passes.gather_late import GatherLate
from fxdistill.passes.keep_teacher import KeepTeacher
from fxdistill.passes.meet_early import MeetEarly
from fxdistill.passes.pack_reductions import PackReductions
from fxdistill.passes.prune_teacher import PruneTeacher
from fxdistill.passes.sum_early import SumEarly

Stage = Literal["each model", "joint", "terms", "step", "terms step"]


@dataclass(frozen=True)
class Wanted:
    """The choices of a distiller: which passes of the list it wants.

    ``user`` are the user's passes. ``compiled`` says whether code is generated. ``made`` says why
    the models made their logits before the graph, for a remark. ``gathers`` says whether the graph
    gathers parameters. ``beside`` names all models but the main one, ``frozen`` those that learn
    nothing. ``terms`` are the names of feature terms. ``disabled`` names the passes to leave out.
    """

    user: tuple[Pass, ...] = ()
    fuse_head: bool = True
    compiled: bool = True
    made: str = ""
    gathers: bool = False
    beside: tuple[Tower, ...] = ("teacher",)
    frozen: tuple[Tower, ...] = ("teacher",)
    terms: tuple[str, ...] = ()
    disabled: tuple[str, ...] = ()

    @property
    def fusing(self) -> tuple[Pass, ...]:
        """The pass that fuses heads, if it is wanted."""
        return (FuseHead(self.compiled, self.made),) if self.fuse_head else ()


class Slot(NamedTuple):
    """Passes of one stage, and the reason for their place in the order."""

    stage: Stage
    passes: Callable[[Wanted], Iterable[Pass]]
    why: str


ORDER = (
    Slot("each model", lambda w: (ExposeOutputs(),), "compose reads values that are outputs"),
    Slot("joint", lambda w: w.user, "the user sees models and losses as they were written"),
    Slot("joint", lambda w: w.fusing, "behind the user's passes, which may read the logits"),
    Slot("joint", lambda w: (FormGradients(w.terms),), "what is left of logit terms is no feature"),
    Slot("joint", lambda w: (PruneTeacher(w.beside),), "last: fusing leaves dead nodes, too"),
    Slot("terms", lambda w: w.fusing, "heads hand over unmade logits here as well"),
    Slot("terms", lambda w: (FormGradients(w.terms),), "as in the joint graph"),
    Slot("step", lambda w: (MeetEarly(w.frozen),), "gathers go where the weights are first read"),
    Slot("step", lambda w: (GatherLate(w.frozen),) if w.gathers else (), "moves gathers about"),
    Slot("step", lambda w: (KeepTeacher(w.frozen),) if w.frozen else (), "only marks nodes"),
    Slot("step", lambda w: (SumEarly(),), "behind what orders terms, before sums are packed"),
    Slot("step", lambda w: (PackReductions(),), "behind all that moves collectives"),
    Slot("step", lambda w: (CountCollectives(),), "last: counts those that are left"),
    Slot("terms step", lambda w: (MeetEarly(w.frozen),), "marks gradients; there is no model"),
    Slot("terms step", lambda w: (SumEarly(),), "as in the step"),
    Slot("terms step", lambda w: (PackReductions(),), "no model is in it, to keep or to gather"),
)


def passes_at(stage: Stage, wanted: Wanted) -> tuple[Pass, ...]:
    """The passes of a stage that a distiller wants, in their order."""
    every = (p for row in ORDER if row.stage == stage for p in row.passes(wanted))
    return tuple(p for p in every if type(p).__name__ not in wanted.disabled)
