"""The costs of a step's two halves: FLOPs by part and block, traffic between ranks, casts."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import fx

from fxdistill.graph.collectives import collectives
from fxdistill.graph.flops import WITH_RANDOM_STATE, bodies_of, flops_of
from fxdistill.graph.halves import Halves
from fxdistill.graph.sections import (
    OBJECTIVE,
    PROJECTIONS,
    Paths,
    holding,
    module_of,
    part_of,
)
from fxdistill.models.tap import Tower
from fxdistill.report.data import Cast, Collective, Flops


def both(halves: Halves) -> Iterator[tuple[str, fx.Node]]:
    """Every node of the step, with its half: "forward" or "backward"."""
    for phase, gm in (("forward", halves.forward), ("backward", halves.backward)):
        for node in gm.graph.nodes:
            yield phase, node


# ---------------------------------------------------------------------- floating point operations


def flops(halves: Halves, teachers: Collection[Tower]) -> Flops:
    """The FLOPs of a step by purpose; models that terms only compare with are ``teachers``."""
    found: Counter[str] = Counter()
    forward = {node.name for node in halves.forward.graph.nodes if node.op == "call_function"}
    for phase, node in both(halves):
        count = flops_of(node)
        if count:
            repeated = node.name in forward or node.target in WITH_RANDOM_STATE
            again = phase == "backward" and repeated
            found["again" if again else _purpose(phase, node, teachers)] += count
    parts = ("teacher", "forward", "backward", "losses", "projections", "again")
    return Flops(**{part: found[part] for part in parts}, total=sum(found.values()))


def _purpose(phase: str, node: fx.Node, teachers: Collection[Tower]) -> str:
    part = part_of(node)
    if part == OBJECTIVE:
        return "projections" if module_of(node)[0] == PROJECTIONS else "losses"
    return "teacher" if part in teachers else phase


def notes_of(halves: Halves) -> Iterator[str]:
    """Notes on what is unknown about loops and branches."""
    names = {str(node.target) for _, node in both(halves) if any(True for _ in bodies_of(node))}
    if names:
        yield f"what {', '.join(sorted(names))} holds while it runs is not in the memory"
    if once := sorted(names.intersection(("while_loop", "associative_scan"))):
        yield f"the body of {', '.join(once)} is counted once: how often it runs is not known"


def by_block(halves: Halves, paths: Paths) -> dict[tuple[str, str, str], int]:
    """FLOPs by model, block and half, for the blocks of every model in ``paths``.

    An operator that a model calls outside its modules belongs to no block. If torch changed how a
    graph names modules, this would hold for all operators: an assertion catches that.
    """
    found: Counter[tuple[str, str, str]] = Counter()
    placed: set[Tower] = set()
    busy: set[Tower] = set()
    for phase, node in both(halves):
        if count := flops_of(node):
            tower, path = module_of(node)
            placed.add(tower)
            busy.add(part_of(node))
            block = holding(path, paths.get(tower, ()))
            if block is not None:
                found[tower, block, phase] += count
    lost = (busy & paths.keys()) - placed
    assert not lost, f"no operator of {sorted(lost)} names the module that it was called in"
    return dict(found)


# ---------------------------------------------------------------------- traffic and casts


def traffic(halves: Halves, main: Tower) -> tuple[Collective, ...]:
    """The collectives of both halves; those of no section count for the main model."""
    found: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for gm in (halves.forward, halves.backward):
        for (section, kind), (times, size) in collectives(gm.graph).items():
            owner = {OBJECTIVE: "terms", None: main}.get(section, section)
            entry = found[str(owner), kind]
            entry[0] += times
            entry[1] += size
    return tuple(Collective(*key, *entry) for key, entry in sorted(found.items()))


Casts = Mapping[Tower, Sequence[tuple[torch.dtype, torch.dtype]]]
_CASTS = (torch.ops.aten._to_copy.default, torch.ops.prims.convert_element_type.default)


def casts(halves: Halves, of_inputs: Casts) -> tuple[Cast, ...]:
    """The casts between floating point dtypes: of models' inputs, and in the forward."""
    found = Counter(
        (tower, _name(before), _name(after))
        for tower, made in of_inputs.items()
        for before, after in made
    )
    for node in halves.forward.graph.nodes:
        if node.target in _CASTS and node.all_input_nodes:  # torch.vmap makes tensors of numbers so
            before, after = node.all_input_nodes[0].meta["val"].dtype, node.meta["val"].dtype
            if before != after and before.is_floating_point and after.is_floating_point:
                part = part_of(node)
                owner = "losses" if part == OBJECTIVE else part
                found[owner, _name(before), _name(after)] += 1
    return tuple(Cast(*key, times) for key, times in sorted(found.items()))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
