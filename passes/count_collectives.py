"""What crosses ranks in a step, and what of it the terms add."""

from dataclasses import dataclass, replace
from typing import ClassVar

from fxdistill.base.figures import size
from fxdistill.graph.collectives import Traffic, collectives, sum_of
from fxdistill.graph.program import Level, P
from fxdistill.graph.sections import OBJECTIVE


@dataclass(frozen=True)
class CountCollectives:
    """Say in the report which collectives the models have, and which the terms add.

    Forward and backward, as they are lowered: a gather that the backward does again is counted
    once. What opaque operators do inside (a fused head on a sharded vocabulary) is not seen here;
    the remark of FuseHead tells it. Changes nothing.
    """

    level: ClassVar[Level] = "joint"

    def __call__(self, program: P) -> P:
        """Count; a program without collectives is returned as it is."""
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
