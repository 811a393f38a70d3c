"""What crosses ranks in a step, and what of it the terms add."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from fxdistill.compose import section_of
from fxdistill.program import P

_PREFIX = "_c10d_functional."
_OTHER = ("wait_tensor",)


class Traffic(NamedTuple):
    """How often a collective runs, and the bytes of what it returns on one rank."""

    times: int
    bytes: int


@dataclass(frozen=True)
class CountCollectives:
    """Say in the report which collectives the models have, and which the terms add.

    Forward and backward, as they are lowered: a gather that the backward does again is counted
    once. What opaque operators do inside (a fused head on a sharded vocabulary) is not seen here;
    the remark of FuseHead tells it. Changes nothing. Works on the joint level.
    """

    def __call__(self, program: P) -> P:
        """Count; a program without collectives is returned as it is."""
        found = collectives(program.gm.graph)
        if not found:
            return program
        models = sum_of(found, ("teacher", "student", None))
        terms = sum_of(found, ("objective",))
        remarks = (f"models: {_shown(models)}", f"terms add: {_shown(terms)}")
        return replace(program, remarks=(*program.remarks, *remarks))


def collectives(graph: fx.Graph) -> dict[tuple[str | None, str], Traffic]:
    """Traffic by section (teacher, student, objective) and collective."""
    counts: Counter[tuple[str | None, str]] = Counter()
    sizes: Counter[tuple[str | None, str]] = Counter()
    for node in graph.nodes:
        name = str(node.target).removeprefix(_PREFIX).split(".")[0]
        if node.op != "call_function" or not str(node.target).startswith(_PREFIX) or name in _OTHER:
            continue
        # What autograd adds behind the last operator has no section: it is what it reads from.
        key = section_of(node) or next(map(section_of, node.all_input_nodes), None), name
        counts[key] += 1
        values = [v for v in tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
        sizes[key] += sum(int(v.numel()) * v.element_size() for v in values)
    return {key: Traffic(count, sizes[key]) for key, count in counts.items()}


def sum_of(
    found: dict[tuple[str | None, str], Traffic], sections: tuple[str | None, ...]
) -> dict[str, Traffic]:
    """Traffic by collective, of some sections."""
    total: dict[str, Traffic] = {}
    for (section, name), (count, size) in found.items():
        if section in sections:
            before = total.get(name, Traffic(0, 0))
            total[name] = Traffic(before.times + count, before.bytes + size)
    return total


def _shown(traffic: dict[str, Traffic]) -> str:
    parts = [
        f"{count} {name.removesuffix('_into_tensor').removesuffix('_tensor')} ({_size(size)})"
        for name, (count, size) in sorted(traffic.items())
    ]
    return ", ".join(parts) or "nothing"


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.3g} GiB"
