"""The fused head where the vocabulary is sharded: no logit crosses a rank, and none is kept.

Two ways, by what moves fewer bytes:

- Every rank holds its columns and takes all tokens. Of each token 8 numbers are gathered and, for n
  divergences, 1 + n reduced, a chunk of tokens at a time. Where tokens are sharded too (sequence
  parallel), hidden states are gathered, and the student's gradient is scattered.
- Where tokens are sharded and many: every rank keeps its tokens and gathers both weights once; the
  gradient of the student's is scattered.

Private to torch and used here only: ``_resolve_process_group``, which finds a group by its name (an
operator takes no group). If it moves, the sharded loss fails in the first call.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from fxdistill.errors import ShapeError, VocabularyError
from fxdistill.losses.chunk import Shape
from fxdistill.losses.chunked import (
    Loop,
    chunk_tokens_for,
    fake,
    require_indices,
    rows_on,
    save,
    scale,
    size_of_chunks,
    vocab_operator,
)
from fxdistill.losses.shard import (
    Chunk,
    Place,
    merged,
    statistics,
    sums,
    terms,
    write_slopes,
)
from fxdistill.nodes import own_code


class Layout(NamedTuple):
    """Where the vocabulary lies."""

    mesh: DeviceMesh
    axis: int  # the mesh dimension that shards it
    gathers_weights: bool

    @property
    def parts(self) -> int:
        """In how many parts the columns are taken."""
        return 1 if self.gathers_weights else self.mesh.size(self.axis)

    @property
    def how(self) -> str:
        """For a report."""
        ranks = self.mesh.size(self.axis)
        if self.gathers_weights:
            return f"tokens on {ranks} ranks: both weights are gathered, once"
        return f"vocabulary on {ranks} ranks: a token's statistics are gathered, never its logits"


# ---------------------------------------------------------------------- the operator


@functools.cache
def _part(fn: Callable[..., Tensor], shape: Shape, place: Place, compiled: bool) -> Any:
    """One of the three parts of a chunk."""

    def part(
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        logit_share: Tensor,
        label_share: Tensor,
        settings: Tensor,
        extra: tuple[Tensor | None, ...],
    ) -> Tensor:
        chunk = Chunk(student, teacher, labels, logit_share, label_share, settings)
        return fn(chunk, *extra, shape, place)

    return torch.compile(own_code(part), fullgraph=True, dynamic=False) if compiled else part


class Body:
    """In place of ``chunk.chunk_terms``: the parts, and what crosses ranks between them."""

    def __init__(
        self, shape: Shape, place: Place, group: dist.ProcessGroup, compiled: bool, slopes: bool
    ) -> None:
        self.shape, self.place, self.group = shape, place, group
        self.compiled, self.slopes = compiled, slopes

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor | None,
        ids: Tensor | None,
        labels: Tensor | None,
        logit_share: Tensor,
        label_share: Tensor,
        settings: Tensor,
    ) -> Tensor:
        """The terms of a chunk, alike on every rank; the student's logits are overwritten."""
        chunk = Chunk(student, teacher, labels, logit_share, label_share, settings)
        own = self._rows(statistics, chunk)
        gathered = own.new_empty(self.group.size(), *own.shape)
        dist.all_gather_into_tensor(gathered.flatten(0, 1), own, group=self.group)
        whole = merged(gathered)
        inner = None
        if teacher is not None and self.shape.divergences:
            inner = self._rows(sums, chunk, whole)
            dist.all_reduce(inner, group=self.group)
        if self.slopes:
            self._rows(write_slopes, chunk, whole, inner)
        return terms(chunk, whole, inner, self.shape, self.place)

    def _rows(self, fn: Callable[..., Tensor], chunk: Chunk, *extra: Tensor | None) -> Tensor:
        """``fn`` of the chunk, a few tokens at a time (see ``losses.chunked``)."""
        part = _part(fn, self.shape, self.place, self.compiled)
        count = chunk.student.shape[0]
        size = rows_on(chunk.student.device)
        found = []
        for i in range(0, count, size):
            c = chunk.rows(i, i + size)
            some = tuple(None if x is None else x[i : i + size] for x in extra)
            tokens = (c.student, c.teacher, c.labels, c.logit_share, c.label_share)
            found.append(part(*tokens, c.settings, some))
        return torch.cat(found) if found[0].ndim else found[0]


def group_of(name: str) -> dist.ProcessGroup:
    """The process group of that name."""
    group: dist.ProcessGroup = _resolve_process_group(name)  # type: ignore[arg-type]
    return group


@torch.library.custom_op("fxdistill::sharded_vocab_loss", mutates_args=())
def sharded_operator(
    h: Tensor,
    w: Tensor,
    bias: Tensor | None,
    t: Tensor | None,
    t_weight: Tensor | None,
    t_bias: Tensor | None,
    ids: Tensor | None,
    labels: Tensor | None,
    logit_share: Tensor,
    label_share: Tensor,
    settings: Tensor,
    shape: str,
    chunk: int,
    needs: str,
    compiled: bool,
    group: str,
    offset: int,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``losses.chunked.vocab_operator`` on the columns from ``offset`` on, of ``size`` in all.

    Weights and biases are this rank's rows, everything else is alike on all ranks of the group. The
    gradient by ``h`` is what these columns contribute.
    """
    require_indices("label", labels, size)
    rows = size_of_chunks(chunk, h)
    loop = Loop(h, w, bias, t, t_weight, t_bias, ids, needs, rows, rows)
    body = Body(Shape.read(shape), Place(offset, size), group_of(group), compiled, bool(needs))
    return loop.run(body, labels, logit_share, label_share, settings)


sharded_operator.register_fake(fake)
sharded_operator.register_autograd(scale, setup_context=save)


# ---------------------------------------------------------------------- DTensors in, tensors out


class Side(NamedTuple):
    """Hidden state, weight and bias of one tower."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def layout_of(student: Side, teacher: Side | None) -> Layout:
    """How the heads are sharded, and the cheaper way; ShapeError where there is none."""
    sides = [side for side in (student, teacher) if side is not None]
    weights = [side.weight for side in sides if isinstance(side.weight, DTensor)]
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
    return Layout(mesh, axis, _gathers_weights(student, teacher, axis))


def _gathers_weights(student: Side, teacher: Side | None, axis: int) -> bool:
    """Whether gathering weights moves fewer bytes than gathering tokens."""
    placement = student.hidden.placements[axis] if isinstance(student.hidden, DTensor) else None
    if placement is None or not placement.is_shard():
        return False  # tokens are everywhere already
    tokens = student.hidden.shape[:-1].numel()
    columns, width = student.weight.shape
    of_tokens, of_weights = 2 * tokens * width, 2 * columns * width  # there, and gradients back
    if teacher is not None:
        of_tokens += tokens * teacher.hidden.shape[-1]
        of_weights += teacher.weight.numel()
    return of_weights < of_tokens


def sharded_vocab_loss(
    student: Side,
    teacher: Side | None,
    labels: Tensor | None,
    shares: tuple[Tensor, Tensor],
    settings: Tensor,
    shape: Shape,
    chunk: int | None,
    compiled: bool,
    needs: Callable[[Tensor, Tensor, Tensor | None], str],
) -> tuple[Tensor, Tensor]:
    """Total and terms, alike on every rank; each rank's backward forms the gradient of its shards.

    ``labels`` and ``shares`` are ``[tokens]``, whole on every rank.
    """
    layout = layout_of(student, teacher)
    columns = [side.weight.shape[0] for side in (student, teacher) if side is not None]
    like = student.hidden.element_size(), student.hidden.device
    if layout.gathers_weights:
        chunk = chunk or chunk_tokens_for(sum(columns), *like)
        return _on_tokens(
            layout, student, teacher, labels, shares, settings, shape, chunk, compiled, needs
        )
    ranks, rank = layout.mesh.size(layout.axis), layout.mesh.get_local_rank(layout.axis)
    each = -(-columns[0] // ranks)
    rows = [min(each, max(0, size - rank * each)) for size in columns]
    local = max(1, *rows)
    chunk = chunk or chunk_tokens_for(len(columns) * local, *like)
    h, w, bias = _local(student, layout, local)
    t, t_weight, t_bias = (None,) * 3 if teacher is None else _local(teacher, layout, local)
    group = layout.mesh.get_group(layout.axis).group_name
    place = (min(rank * each, columns[0]), columns[0])
    head = (h, w, bias, t, t_weight, t_bias, None, labels, *shares, settings)
    total, of_terms, *_ = sharded_operator(
        *head, shape.text, chunk, needs(h, w, bias), compiled, group, *place
    )
    return total, of_terms


def whole(x: Tensor) -> Tensor:
    """All of ``x`` on every rank."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local_part(x: Tensor) -> Tensor:
    """What of ``x`` is here."""
    return x.to_local() if isinstance(x, DTensor) else x


def _local(side: Side, layout: Layout, rows: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """All tokens, and this rank's rows of weight and bias, filled up to ``rows``."""
    everywhere: list[Placement] = [Replicate()] * layout.mesh.ndim
    mine: list[Placement] = list(everywhere)
    mine[layout.axis] = Shard(0)
    contribution: list[Placement] = list(everywhere)
    contribution[layout.axis] = Partial()
    h = placed(side.hidden, layout.mesh, everywhere).to_local(grad_placements=contribution)
    w = _filled(placed(side.weight, layout.mesh, mine).to_local(), rows)
    if side.bias is None:
        return h.flatten(0, -2), w, None
    return h.flatten(0, -2), w, _filled(placed(side.bias, layout.mesh, mine).to_local(), rows)


def placed(x: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """``x`` with these placements; a plain tensor is alike on all ranks."""
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return x.redistribute(mesh, placements)


def _filled(x: Tensor, rows: int) -> Tensor:
    missing = rows - x.shape[0]
    return torch.nn.functional.pad(x, (0, 0) * (x.ndim - 1) + (0, missing)) if missing else x


def _on_tokens(
    layout: Layout,
    student: Side,
    teacher: Side | None,
    labels: Tensor | None,
    shares: tuple[Tensor, Tensor],
    settings: Tensor,
    shape: Shape,
    chunk: int,
    compiled: bool,
    needs: Callable[[Tensor, Tensor, Tensor | None], str],
) -> tuple[Tensor, Tensor]:
    """Every rank its tokens, with both weights gathered; the total is summed over ranks."""
    mesh, axis = layout.mesh, layout.axis
    assert isinstance(student.hidden, DTensor)
    tokens = student.hidden.placements
    everywhere: list[Placement] = [Replicate()] * mesh.ndim
    contribution: list[Placement] = list(everywhere)
    contribution[axis] = Partial()

    def local(side: Side) -> tuple[Tensor, Tensor, Tensor | None]:
        h = placed(side.hidden, mesh, list(tokens)).to_local().flatten(0, -2)
        given = [None if x is None else placed(x, mesh, everywhere) for x in side[1:]]
        w, bias = (None if x is None else x.to_local(grad_placements=contribution) for x in given)
        assert w is not None
        return h, w, bias

    def taken(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        grid = x.reshape(student.hidden.shape[:-1])
        return placed(grid, mesh, list(tokens)).to_local().flatten()

    h, w, bias = local(student)
    t, t_weight, t_bias = (None,) * 3 if teacher is None else local(teacher)
    of_tokens = (taken(labels), *map(taken, shares))
    total, of_terms, *_ = vocab_operator(
        h, w, bias, t, t_weight, t_bias, None, *of_tokens, settings, shape.text, chunk,
        needs(h, w, bias), compiled,
    )  # fmt: skip
    total, of_terms = (
        DTensor.from_local(x, mesh, contribution, run_check=False)
        .redistribute(mesh, everywhere)
        .to_local()
        for x in (total, of_terms)
    )
    return total, of_terms
