"""The memory that a step holds at each moment, by owner, and its worst moment."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from fxdistill.graph.halves import Halves
from fxdistill.graph.liveness import Instant, storages, timeline
from fxdistill.graph.program import output_values
from fxdistill.graph.sections import OBJECTIVE, Paths, holding, module_of, part_of
from fxdistill.losses.fused.call import HeadCall
from fxdistill.losses.fused.operator import HEAD
from fxdistill.losses.fused.peer_operator import PEERS, peer_bytes
from fxdistill.losses.fused.score_operator import SCORES, score_bytes
from fxdistill.losses.fused.sizes import BODY, size_of_chunks, sizes_on
from fxdistill.report.data import Memory, Moment
from fxdistill.report.read.owners import OF_HEADS, Heads, owners

MOMENTS = 200  # about how many a timeline keeps
_BYTES: dict[Any, Callable[..., int]] = {SCORES: score_bytes, PEERS: peer_bytes}


def memory(
    halves: Halves,
    weights: dict[str, int],
    gradients: int,
    states: dict[str, int],
    heads: Heads,
    paths: Paths,
) -> Memory:
    """The memory of a step over time and at its worst moment, in bytes."""
    instants = list(timeline(halves, owners(halves, heads), own_bytes))
    worst = max(range(len(instants)), key=lambda i: instants[i].total)
    peak = instants[worst]
    saved = _saved(halves)
    base = sum(weights.values())
    live = peak.held.get("gradients", 0)
    at_peak = min(saved, peak.total - live) if peak.phase == "backward" else saved
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizers=states,
        saved=saved,
        taps=max(i.held.get("taps", 0) for i in instants),
        head=max(i.held.get("head", 0) + _of_head(i) for i in instants),
        transient=max(0, peak.total - live - at_peak),
        peak=base + peak.total,
        peak_at=_where(peak, paths),
        timeline=tuple(_moments(instants, worst, base, paths)),
    )


def _of_head(instant: Instant) -> int:
    return instant.own if instant.node.target in OF_HEADS else 0


def own_bytes(node: fx.Node) -> int:
    """Bytes that the fused head allocates within: a chunk's logits, and values of some tokens."""
    if node.target in _BYTES:
        given: Any = fx.node.map_arg(node.args, lambda n: n.meta.get("val"))
        return _BYTES[node.target](*given)
    if node.target is not HEAD:
        return 0
    call = HeadCall.of(node)
    h, w = call.h, call.w
    columns = w.shape[0] + (0 if call.t_weight is None else call.t_weight.shape[0])
    kind = 8 if h.dtype == torch.float64 else 4
    of_others = sum(weight.shape[0] for weight in call.others[1::3])
    mean = w.shape[0] * kind if call.others else 0  # of all teachers
    token = (columns + of_others) * h.element_size() + mean
    chunk = size_of_chunks(call.chunk, h) * token
    body = 0 if call.compiled else BODY * sizes_on(h.device).rows * w.shape[0] * kind
    wide = w.numel() * kind if "w" in call.needs and kind != w.element_size() else 0
    return int(chunk + body + wide)


def _saved(halves: Halves) -> int:
    """The bytes that the forward saves for the backward, without its inputs."""
    inputs = {s for n in halves.forward.graph.find_nodes(op="placeholder") for s in storages(n)}
    sizes: dict[int, int] = {}
    for value in output_values(halves.forward.graph)[halves.outputs :]:
        if isinstance(value, fx.Node):
            sizes.update(storages(value))
    return sum(size for storage, size in sizes.items() if storage not in inputs)


def _moments(instants: list[Instant], worst: int, base: int, paths: Paths) -> Iterator[Moment]:
    """The instant that holds most in each stretch of the step, and the step's end."""
    width = max(1, len(instants) // MOMENTS)
    for start in range(0, len(instants), width):
        some = range(start, min(start + width, len(instants)))
        ends = some.stop == len(instants)
        most = max(some, key=lambda i: instants[i].total)
        top = worst if worst in some else some.stop - 1 if ends else most
        instant = instants[top]
        held = {name: size for name, size in instant.held.items() if size}
        if instant.own:
            whose = "head" if instant.node.target in OF_HEADS else _lender(instant)
            held[whose] = held.get(whose, 0) + instant.own
        yield Moment(instant.phase, _where(instant, paths), {"weights": base, **held})


def _lender(instant: Instant) -> str:
    """The owner whose memory an in-place kernel reuses: assumed to be the one that holds most."""
    return max(instant.held, key=lambda name: instant.held[name])


def _where(instant: Instant, paths: Paths) -> str:
    node = instant.node
    if node.target in OF_HEADS:
        return "fused head"
    tower, path = module_of(node)
    block = holding(path, paths.get(tower, ()))
    if block is not None:
        return f"{tower} {block}".rstrip()
    part = part_of(node)
    return "losses" if part == OBJECTIVE else part
