"""The memory that is allocated while a step runs, by a walk over its graphs.

A value lives from the operator that computes it to the last one that reads it or a view of it. A
value saved for the backward lives until its last reader there; gradients live to the end. If
operators are fused (Inductor), only values that cross kernels are allocated: see ``kernels.py``.
Nothing is run.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from fxdistill.graph.halves import Halves
from fxdistill.graph.kernels import Kernel, kernels_of
from fxdistill.graph.program import output_values

Storage = int  # the identity of a fake storage: views share it
Label = Callable[[fx.Node, Storage], str]  # the owner of a value that an operator allocates


@dataclass(frozen=True)
class Instant:
    """The memory while one kernel runs: bytes by owner, and bytes that it needs for itself."""

    phase: str
    node: fx.Node
    held: dict[str, int]
    own: int

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.held.values()) + self.own


@dataclass
class _Heap:
    """The allocated bytes by owner, and the owner and bytes of each live storage."""

    held: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    alive: dict[Storage, tuple[str, int]] = field(default_factory=dict)

    def take(self, storage: Storage, owner: str, size: int) -> None:
        if storage not in self.alive:
            self.alive[storage] = owner, size
            self.held[owner] += size

    def size(self, some: Iterable[Storage]) -> int:
        """The bytes of those storages that are alive."""
        return sum(self.alive[storage][1] for storage in some if storage in self.alive)

    def free(self, storage: Storage) -> None:
        owner, size = self.alive.pop(storage, ("", 0))
        if owner:
            self.held[owner] -= size


def storages(node: fx.Node) -> dict[Storage, int]:
    """The storages behind the tensors of ``node``, with their bytes."""
    values = [v for v in tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
    return {int(v.untyped_storage()._cdata): int(v.untyped_storage().nbytes()) for v in values}


def timeline(halves: Halves, owner: Label, own: Callable[[fx.Node], int]) -> Iterator[Instant]:
    """Yield every kernel of the step in order, with the memory that is allocated while it runs.

    ``own(node)`` are the bytes that an operator needs for itself. Parameters and inputs are not
    counted.
    """
    forward, backward = halves.forward.graph, halves.backward.graph
    outside = _outside(forward)
    heap = _Heap()
    kept = _returned(forward)
    gradients = _returned(backward) - outside
    for phase, graph, stays in (("forward", forward, kept), ("backward", backward, gradients)):
        kernels = kernels_of(graph, halves.fuses)
        last = _last_reads(kernels)
        for i, kernel in enumerate(kernels):
            dying = {s for s in last[i] if s not in stays and s not in outside}
            reused = heap.size(dying) if kernel.in_place else 0
            made = 0
            for node in kernel.writes:
                for storage, size in storages(node).items():
                    if storage in outside or storage in heap.alive:
                        continue
                    whose = "gradients" if storage in gradients else owner(node, storage)
                    made += size
                    heap.take(storage, whose, size)
            held = dict(heap.held)
            yield Instant(phase, kernel.node, held, own(kernel.node) - min(made, reused))
            for storage in dying:
                heap.free(storage)


def _outside(forward: fx.Graph) -> set[Storage]:
    """The storages of parameters, buffers and the batch."""
    return {s for node in forward.find_nodes(op="placeholder") for s in storages(node)}


def _returned(graph: fx.Graph) -> set[Storage]:
    values: Iterable[object] = output_values(graph)
    return {s for v in values if isinstance(v, fx.Node) for s in storages(v)}


def _last_reads(kernels: list[Kernel]) -> list[set[Storage]]:
    """For each kernel, the storages that it is the last to read or write."""
    last: dict[Storage, int] = {}
    for i, kernel in enumerate(kernels):
        for node in (*kernel.reads, *kernel.writes):
            for storage in storages(node):
                last[storage] = i
    found: list[set[Storage]] = [set() for _ in kernels]
    for storage, i in last.items():
        found[i].add(storage)
    return found
