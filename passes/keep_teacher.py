"""Never run a frozen teacher twice."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch.utils.checkpoint import CheckpointPolicy

from fxdistill.graph.program import Level, P, fork_module
from fxdistill.graph.sections import section_of
from fxdistill.models.tap import Tower


@dataclass(frozen=True)
class KeepTeacher:
    """Forbid the partitioner to recompute, in the backward, what the teacher hands to the terms.

    The partitioner weighs bytes saved against operators run again and does not know that the
    teacher takes no part in the backward: at a low ``activation_memory_budget`` it runs whole
    teacher layers a second time. Behind the values marked here (those that the teacher's nodes hand
    to others) nothing of the teacher is ever needed again. ``teachers`` are the names of models
    that learn nothing.
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
