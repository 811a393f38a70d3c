"""The fused head for a sharded vocabulary: ranks exchange no logits, and keep none.

There are two forms, and the one that moves fewer bytes is chosen:

- Every rank computes its columns for all tokens. For each token, 8 numbers are gathered and, for n
  divergences, 1 + n are reduced, a chunk of tokens at a time. If tokens are sharded too (sequence
  parallel), hidden states are gathered, and the gradient of the student's is scattered.
- If tokens are sharded and many, every rank keeps its tokens and gathers both weights once; the
  gradient of the student's weight is scattered.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from torch.distributed.tensor import Shard as Sharded

from fxdistill.base.placement import chunk_of, placed
from fxdistill.errors import ShapeError, VocabularyError
from fxdistill.losses.fused.call import HeadCall, HeadSide, HeadTerms, Shard
from fxdistill.losses.fused.operator import vocab_operator
from fxdistill.losses.fused.sizes import chunk_tokens_for


class ShardedHeads(NamedTuple):
    """How the vocabulary is sharded, and which form is chosen."""

    mesh: DeviceMesh
    axis: int  # the mesh dimension that shards it
    gathers_weights: bool

    @property
    def parts(self) -> int:
        """Into how many parts the columns are split over ranks."""
        return 1 if self.gathers_weights else self.mesh.size(self.axis)

    @property
    def how(self) -> str:
        """The form in words, for a report."""
        ranks = self.mesh.size(self.axis)
        if self.gathers_weights:
            return f"tokens on {ranks} ranks: both weights are gathered, once"
        return f"vocabulary on {ranks} ranks: a token's statistics are gathered, never its logits"


def sharded_heads_of(student: HeadSide, teacher: HeadSide | None) -> ShardedHeads:
    """Choose the cheaper form; ShapeError or VocabularyError if the heads fit neither."""
    sides = [side for side in (student, teacher) if side is not None]
    weights = [side.weight for side in sides if isinstance(side.weight, DTensor)]
    if not weights:
        raise ShapeError("a hidden state is a DTensor, and the weights of the heads are not")
    mesh = weights[0].device_mesh
    axes = {
        axis
        for weight in weights
        for axis, placement in enumerate(weight.placements)
        if not placement.is_replicate()
    }
    rows = all(p.is_replicate() or p.is_shard(0) for w in weights for p in w.placements)
    if len(axes) != 1 or not rows or any(w.device_mesh != mesh for w in weights):
        shown = " and ".join(f"{list(w.shape)} {w.placements} on {w.device_mesh}" for w in weights)
        raise ShapeError(
            f"the heads are {shown}: both must lie on one mesh, the vocabulary sharded over one of "
            "its dimensions (Shard(0) of the weight) and all else replicated."
        )
    axis = axes.pop()
    ranks = mesh.size(axis)
    each = {-(-side.weight.shape[0] // ranks) for side in sides}
    if len(each) > 1:
        sizes = " and ".join(str(side.weight.shape[0]) for side in sides)
        raise VocabularyError(
            f"vocabularies of {sizes} entries do not lie on the same {ranks} ranks: pad the "
            "smaller one, so that a rank holds the same entries of both."
        )
    for side in sides:
        if isinstance(side.hidden, DTensor):
            others = [p for i, p in enumerate(side.hidden.placements) if i != axis]
            if any(not p.is_replicate() for p in others) or side.hidden.placements[axis].is_shard(
                side.hidden.ndim - 1
            ):
                raise ShapeError(
                    f"a hidden state is {side.hidden.placements}: replicated, or with its tokens "
                    "sharded over the dimension that shards the vocabulary"
                )
    return ShardedHeads(mesh, axis, _gathers_weights(student, teacher, axis))


def _gathers_weights(student: HeadSide, teacher: HeadSide | None, axis: int) -> bool:
    """Whether gathering weights moves fewer bytes than gathering tokens."""
    placement = student.hidden.placements[axis] if isinstance(student.hidden, DTensor) else None
    if placement is None or not placement.is_shard():
        return False  # every rank has all tokens already
    tokens = student.hidden.shape[:-1].numel()
    columns, width = student.weight.shape
    of_tokens, of_weights = 2 * tokens * width, 2 * columns * width  # values there, gradients back
    if teacher is not None:
        of_tokens += tokens * teacher.hidden.shape[-1]
        of_weights += teacher.weight.numel()
    return of_weights < of_tokens


def sharded_vocab_loss(
    student: HeadSide, teacher: HeadSide | None, terms: HeadTerms
) -> tuple[Tensor, Tensor]:
    """Total and terms, the same on all ranks; the backward forms the gradient of local shards."""
    layout = sharded_heads_of(student, teacher)
    form = _on_tokens if layout.gathers_weights else _on_columns
    return form(layout, student, teacher, terms)


def _on_columns(
    layout: ShardedHeads, student: HeadSide, teacher: HeadSide | None, terms: HeadTerms
) -> tuple[Tensor, Tensor]:
    """Every rank computes its columns for all tokens."""
    mesh, axis = layout.mesh, layout.axis
    sizes = [side.weight.shape[0] for side in (student, teacher) if side is not None]
    first, each = chunk_of(mesh, axis, sizes[0])
    rows = max(1, *(min(each, max(0, size - first)) for size in sizes))
    ours = local_side(student, layout, rows)
    theirs = None if teacher is None else local_side(teacher, layout, rows)
    h = ours.hidden
    chunk = terms.chunk or chunk_tokens_for(len(sizes) * rows, h.element_size(), h.device)
    shard = Shard(mesh.get_group(axis).group_name, first, sizes[0])
    call = HeadCall.make(ours, theirs, terms, chunk, shard)
    total, of_terms, *_ = vocab_operator(*call)
    return total, of_terms


def local_side(side: HeadSide, layout: ShardedHeads, rows: int) -> HeadSide:
    """All tokens, and this rank's rows of weight and bias, padded to ``rows``."""
    everywhere: list[Placement] = [Replicate()] * layout.mesh.ndim
    mine: list[Placement] = list(everywhere)
    mine[layout.axis] = Sharded(0)
    contribution: list[Placement] = list(everywhere)
    contribution[layout.axis] = Partial()
    h = placed(side.hidden, layout.mesh, everywhere).to_local(grad_placements=contribution)
    w = _filled(placed(side.weight, layout.mesh, mine).to_local(), rows)
    if side.bias is None:
        return HeadSide(h.flatten(0, -2), w)
    bias = _filled(placed(side.bias, layout.mesh, mine).to_local(), rows)
    return HeadSide(h.flatten(0, -2), w, bias)


def _filled(x: Tensor, rows: int) -> Tensor:
    missing = rows - x.shape[0]
    return torch.nn.functional.pad(x, (0, 0) * (x.ndim - 1) + (0, missing)) if missing else x


def _on_tokens(
    layout: ShardedHeads, student: HeadSide, teacher: HeadSide | None, terms: HeadTerms
) -> tuple[Tensor, Tensor]:
    """Every rank computes its tokens with gathered weights; the total is summed over ranks."""
    mesh, axis = layout.mesh, layout.axis
    assert isinstance(student.hidden, DTensor)
    tokens = student.hidden.placements
    everywhere: list[Placement] = [Replicate()] * mesh.ndim
    contribution: list[Placement] = list(everywhere)
    contribution[axis] = Partial()

    def local(side: HeadSide) -> HeadSide:
        h = placed(side.hidden, mesh, list(tokens)).to_local().flatten(0, -2)
        return HeadSide(h, whole(side.weight), None if side.bias is None else whole(side.bias))

    def whole(x: Tensor) -> Tensor:
        return placed(x, mesh, everywhere).to_local(grad_placements=contribution)

    def taken(x: Tensor) -> Tensor:
        grid = x.reshape(student.hidden.shape[:-1])
        return placed(grid, mesh, list(tokens)).to_local().flatten()

    ours, theirs = local(student), None if teacher is None else local(teacher)
    columns = sum(side.weight.shape[0] for side in (ours, theirs) if side is not None)
    h = ours.hidden
    chunk = terms.chunk or chunk_tokens_for(columns, h.element_size(), h.device)
    labels = None if terms.labels is None else taken(terms.labels)
    logit_share, label_share = terms.shares
    here = terms._replace(labels=labels, shares=(taken(logit_share), taken(label_share)))
    total, of_terms, *_ = vocab_operator(*HeadCall.make(ours, theirs, here, chunk))
    total, of_terms = (
        DTensor.from_local(x, mesh, contribution, run_check=False)
        .redistribute(mesh, everywhere)
        .to_local()
        for x in (total, of_terms)
    )
    return total, of_terms
