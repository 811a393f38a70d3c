"""Remove the nodes of a teacher that no term needs."""

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

    1. The head is erased if there is no logit term, and so are the layers above the deepest tap.
    2. A node that writes a parameter, a buffer or a value that is read stays.
    3. A node without a value (grad mode, autocast, assertions) stays.

    The placeholders stay, because they are the calling convention. ``towers`` names the models to
    prune.
    """

    towers: tuple[Tower, ...] = ("teacher",)
    level: ClassVar[Level] = "captured"

    def __call__(self, program: P) -> P:
        """Prune; a program whose teachers have no dead nodes is returned as it is."""
        if not any(self._is_ours(node) for node in program.gm.graph.nodes):
            return program
        gm = fork_module(program.gm)
        # Nodes outside the teacher stay, dead or not, and so do the nodes that they read.
        others = [n for n in gm.graph.nodes if not self._is_ours(n)]
        live = effects_of(gm).live(gm.graph, others)
        dead = [n for n in gm.graph.nodes if self._is_ours(n) and n not in live]
        if not dead:
            return program
        for node in reversed(dead):
            gm.graph.erase_node(node)
        return replace(program, gm=gm)

    def _is_ours(self, node: fx.Node) -> bool:
        return section_of(node) in self.towers
