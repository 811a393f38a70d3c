"""Never run a frozen teacher twice."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch.utils.checkpoint import CheckpointPolicy

from fxdistill.graph.program import Level, P, fork_module
from fxdistill.graph.sections import section_of
from fxdistill.models.tap import Tower


@dataclass(frozen=True)
class KeepTeacher:
    """Forbid the partitioner to recompute the teacher's values in the backward.

    The partitioner weighs saved bytes against recomputed operators, and does not know that the
    teacher takes no part in the backward: at a low ``activation_memory_budget`` it would run whole
    teacher layers a second time. The pass marks the values of the teacher that other sections read
    as saved; once they are saved, the backward needs nothing else of the teacher. ``teachers``
    names the frozen models.
    """

    teachers: tuple[Tower, ...] = ("teacher",)
    level: ClassVar[Level] = "joint"

    def __call__(self, program: P) -> P:
        """Mark the teacher's last values; a program without a teacher is returned as it is."""
        gm = fork_module(program.gm)
        frontier = [
            node
            for node in gm.graph.nodes
            if section_of(node) in self.teachers
            and any(section_of(user) != section_of(node) for user in node.users)
        ]
        for node in frontier:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        return replace(program, gm=gm) if frontier else program
