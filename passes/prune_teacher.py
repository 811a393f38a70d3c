"""Remove what no term needs from a teacher."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from fxdistill.graph.effects import effects_of
from fxdistill.graph.program import Level, P, fork_module
from fxdistill.graph.sections import section_of
from fxdistill.models.tap import Tower


@dataclass(frozen=True)
class PruneTeacher:
    """Erase the teacher's nodes on which no output depends.

    1. Its head goes where there is no logit term, and the layers above the deepest tap.
    2. What writes a parameter or a buffer stays, and so does what writes a value that is read.
    3. What has no value (grad mode, autocast, assertions) stays.

    The placeholders stay: they are the calling convention. ``teachers`` are the names of the
    models that this is about.
    """

    teachers: tuple[Tower, ...] = ("teacher",)
    level: ClassVar[Level] = "captured"

    def __call__(self, program: P) -> P:
        """Prune; a teacher that is needed to its last node is returned as it is."""
        if not any(self._is_ours(node) for node in program.gm.graph.nodes):
            return program
        gm = fork_module(program.gm)
        # What is not the teacher's stays, dead or not, and so does what it reads.
        others = [n for n in gm.graph.nodes if not self._is_ours(n)]
        live = effects_of(gm).live(gm.graph, others)
        dead = [n for n in gm.graph.nodes if self._is_ours(n) and n not in live]
        if not dead:
            return program
        for node in reversed(dead):
            gm.graph.erase_node(node)
        return replace(program, gm=gm)

    def _is_ours(self, node: fx.Node) -> bool:
        return section_of(node) in self.teachers
