"""The owners of a step's memory: teacher, student, matched values, head, losses."""

from collections.abc import Collection, Mapping

from torch import Tensor, fx

from fxdistill.graph.halves import Halves
from fxdistill.graph.kernels import is_view
from fxdistill.graph.liveness import Label, Storage, storages
from fxdistill.graph.sections import OBJECTIVE, holding, module_of, part_of
from fxdistill.losses.fused.operator import HEAD
from fxdistill.losses.fused.peer_operator import PEERS
from fxdistill.losses.fused.score_operator import SCORES

OF_HEADS = (HEAD, SCORES, PEERS)  # the operators of fused heads
Heads = Mapping[str, tuple[str, int]]  # by tower: the path of the head, and the width of its logits


def owners(halves: Halves, heads: Heads) -> Label:
    """A function that names the owner of what an operator allocates.

    "taps" owns the matched values of the forward. "head" owns the logits, values of the losses that
    are as wide as logits, and the results of the fused head.
    """
    head, taps = _logits(halves, heads), _tapped(halves.forward.graph)

    def owner(node: fx.Node, storage: Storage) -> str:
        if node.target in OF_HEADS or node.name in head:
            return "head"
        if storage in taps:
            return "taps"
        part = part_of(node)
        return "losses" if part == OBJECTIVE else part

    return owner


def _tapped(forward: fx.Graph) -> set[Storage]:
    """The storages of model values that the objective reads other than through the fused head."""
    found: set[Storage] = set()
    for node in forward.nodes:
        if node.op == "call_function" and part_of(node) != OBJECTIVE and _is_compared(node):
            found.update(storages(node))
    return found


def _is_compared(node: fx.Node) -> bool:
    readers = [user for user in node.users if user.op != "output" and user.target not in OF_HEADS]
    ours = [user for user in readers if part_of(user) == OBJECTIVE]
    return any(_is_compared(user) if is_view(user) else True for user in ours)


def _logits(halves: Halves, heads: Heads) -> set[str]:
    """The names of logits, and of values as wide that the objective computes from them."""
    widths = {width for _, width in heads.values()}
    found: set[str] = set()
    for gm in (halves.forward, halves.backward):
        for node in gm.graph.nodes:
            if node.op == "call_function" and _columns(node) in widths:
                within = part_of(node) == OBJECTIVE and any(
                    n.name in found for n in node.all_input_nodes
                )
                if within or _is_made_by(node, heads):
                    found.add(node.name)
    return found


def _is_made_by(node: fx.Node, heads: Heads) -> bool:
    tower, path = module_of(node)
    own: Collection[str] = (heads[tower][0],) if tower in heads else ()
    return bool(own) and holding(path, own) is not None


def _columns(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return int(value.shape[-1]) if isinstance(value, Tensor) and value.ndim > 1 else None
