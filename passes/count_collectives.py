"""Count the collectives of a step, those of the models and those that the terms add."""

from dataclasses import dataclass, replace
from typing import ClassVar

from fxdistill.base.figures import size
from fxdistill.graph.collectives import Traffic, collectives, sum_of
from fxdistill.graph.program import Level, P
from fxdistill.graph.sections import OBJECTIVE


@dataclass(frozen=True)
class CountCollectives:
    """Report which collectives the models have, and which the terms add.

    The pass counts forward and backward before they are partitioned: a gather that the backward
    repeats counts once. It does not see collectives inside opaque operators (a fused head on a
    sharded vocabulary); the remark of FuseHead names those. It changes nothing.
    """

    level: ClassVar[Level] = "joint"

    def __call__(self, program: P) -> P:
        """Add the counts as remarks; a program without collectives is returned as it is."""
        found = collectives(program.gm.graph)
        if not found:
            return program
        models = sum_of(found, lambda section: section != OBJECTIVE)
        terms = sum_of(found, lambda section: section == OBJECTIVE)
        remarks = (f"models: {_shown(models)}", f"terms add: {_shown(terms)}")
        return replace(program, remarks=(*program.remarks, *remarks))


def _shown(traffic: dict[str, Traffic]) -> str:
    parts = [
        f"{count} {name.removesuffix('_into_tensor').removesuffix('_tensor')} ({size(bytes_of)})"
        for name, (count, bytes_of) in sorted(traffic.items())
    ]
    return ", ".join(parts) or "nothing"
