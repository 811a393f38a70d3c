"""The passes, one in each file; README.md says how to write one."""

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

__all__ = [
    "CountCollectives",
    "ExposeOutputs",
    "FormGradients",
    "FuseHead",
    "GatherLate",
    "KeepTeacher",
    "MeetEarly",
    "PackReductions",
    "PruneTeacher",
    "SumEarly",
]
