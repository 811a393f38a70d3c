"""The loop over chunks, as one opaque operator that forms its gradients in the forward.

The operator is opaque so that dynamo does not unroll the loop (a graph for every length) and
Inductor does not fuse across chunks (measured: 82 MB became 606 MB). The body of a chunk is
compiled separately, for one number of tokens; the last chunk is padded with tokens that do not
count. The body takes a few tokens of the chunk at a time, so that its intermediates are small (on a
CPU they stay in the cache). The projections take as many tokens as the memory allows, because each
reads the whole weight.

Private to torch and used here only: ``_AutoDispatchBelowADInplaceOrView``. If it moves, the first
call of the operator fails.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxdistill.base.nodes import own_code
from fxdistill.losses import fused
from fxdistill.losses.fused import teachers
from fxdistill.losses.fused.call import HeadCall, HeadSide
from fxdistill.losses.fused.chunk import Chunk, ChunkSpec, chunk_terms
from fxdistill.losses.fused.gradients import require_first_order, require_indices, scaled
from fxdistill.losses.fused.head_gradients import HeadGradients
from fxdistill.losses.fused.shard import ColumnRange
from fxdistill.losses.fused.sizes import size_of_chunks, sizes_on

Body = Callable[[Chunk], Tensor]


@functools.cache
def _body(shape: ChunkSpec, want_gradient: bool, compiled: bool) -> Body:
    """The body of a chunk for one ``shape``; compiled if ``compiled``."""

    def body(chunk: Chunk) -> Tensor:
        return chunk_terms(chunk, shape, want_gradient)

    if not compiled:
        return body
    return torch.compile(own_code(body), fullgraph=True, dynamic=False)


@torch.library.custom_op("fxdistill::vocab_loss", mutates_args=())
def vocab_operator(
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
    others: Sequence[Tensor],
    mixture: Tensor | None,
    mixed: str,
    spec: str,
    chunk: int,
    needs: str,
    compiled: bool,
    group: str,
    offset: int,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Total and terms, and the total's gradients by ``h``, ``w`` and ``bias`` (else empty).

    ``h`` ``[T, D]``, ``w`` ``[V, D]``, ``t`` ``[T, D_T]``, ``t_weight`` ``[V_T, D_T]``, ``labels``
    and the shares ``[T]``, ``settings`` ``[3]``: the weights of the two terms and τ. ``needs``
    names the gradients by their letters h, w and b. With ``ids`` ``[T, k]``, ``t`` ``[T, k]`` are
    log-probabilities of those entries and there is no ``t_weight``. With ``mixture`` ``[K]``, the
    teacher is the mean of K, whose further heads are ``others``: see ``fused.teachers``.

    With ``group``, the name of a process group, weights and biases are this rank's rows, from
    ``offset`` on, of a vocabulary of ``size``; everything else is the same on all ranks of the
    group, and the gradient by ``h`` is the contribution of these rows.
    """
    call = HeadCall(
        *(h, w, bias, t, t_weight, t_bias, ids, labels, logit_share, label_share, settings),
        *(others, mixture, mixed, spec, chunk, needs, compiled, group, offset, size),
    )
    require_indices("label", labels, size or w.shape[0])
    require_indices("teacher's id", ids, w.shape[0])
    tokens, rows = size_of_chunks(chunk, h), sizes_on(h.device).rows
    kind, slopes = ChunkSpec.read(spec), bool(needs)
    if group:
        mine = ColumnRange(offset, size)
        body: Body = fused.sharded_body.ShardedBody(kind, mine, group, slopes, compiled)
        rows = tokens  # ShardedBody splits a chunk itself, between its collectives
    else:
        body = _body(kind, slopes, compiled)
    return _Loop(call, tokens, rows).run(body)


class _Loop:
    """The buffers that all chunks use, and the gradients that they add to."""

    def __init__(self, call: HeadCall, size: int, rows: int) -> None:
        self.call, self.size = call, size
        self.rows = rows  # tokens that the body takes at a time
        self.scored = bool(ChunkSpec.read(call.spec).score)
        h, w = call.h, call.w
        self.formed = HeadGradients(HeadSide(h, w, call.bias), call.needs)
        self.teacher = None if call.t_weight is None else (call.t, call.t_weight, call.t_bias)
        self.stored = None if call.ids is None else (call.t, call.ids)
        self.z = h.new_empty(size, w.shape[0])
        wide = None if call.t_weight is None else call.t_weight.shape[0]
        self.y = None if wide is None else call.t.new_empty(size, wide)
        self.mixing = None
        if call.mixture is not None:
            columns, sides = ChunkSpec.read(call.spec).columns, teachers.unpacked(call.others)
            spec = teachers.MixSpec.read(call.mixed)
            some = teachers.Rows(rows, columns, call.compiled)
            self.mixing = teachers.Mixing(sides, spec, size, some)

    def run(self, body: Body) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Run all chunks; return total, terms and gradients."""
        settings = self.call.settings
        # Autograd calls the operator below its own dispatch keys, a compiled step above them.
        # Dynamo guards on these keys: the second step would compile the body of a chunk again.
        with torch.no_grad(), torch._C._AutoDispatchBelowADInplaceOrView():
            terms = settings.new_zeros(2)
            for start in range(0, self.call.h.shape[0], self.size):
                terms += self._step(body, start)
            if self.scored:
                terms = self._over_shares(terms)
            total = (settings[:2] * terms).sum()
            return total, terms, *self.formed.all()

    def _step(self, body: Body, start: int) -> Tensor:
        """Run one chunk (both projections, the body, the gradients) and return its terms."""
        call = self.call
        count = min(self.size, call.h.shape[0] - start)
        filled = -(-count // self.rows) * self.rows
        shares = [
            taken(share, start, count, filled) for share in (call.logit_share, call.label_share)
        ]
        own = None if call.labels is None else taken(call.labels, start, count, filled)
        hidden = taken(call.h, start, count, filled)
        z, y, ids = self.z[:filled], None, None
        project(hidden, call.w, call.bias, z)
        if self.teacher is not None and self.y is not None:
            t, t_weight, t_bias = self.teacher
            y = self.y[:filled]
            project(taken(t, start, count, filled), t_weight, t_bias, y)
            if self.mixing is not None:
                of_chunk = functools.partial(taken, start=start, count=count, filled=filled)
                y = self.mixing.mixed(y, of_chunk, call.mixture, call.settings[2])
        if self.stored is not None:
            y, ids = (taken(x, start, count, filled) for x in self.stored)
        chunk = Chunk(z, y, ids, own, shares[0], shares[1], call.settings)
        starts = range(0, filled, self.rows)
        each = [body(chunk.rows(some, some + self.rows)) for some in starts]
        self.formed.add(z, hidden, chunk.live, start, count)
        return torch.cat(each, -1).sum(-1)

    def _over_shares(self, terms: Tensor) -> Tensor:
        """Divide value and gradients by the sum of the shares, which the scores have changed."""
        value, shares = terms.unbind()
        scale = torch.where(shares == 0, 0.0, 1 / shares)
        self.formed.scale(scale)
        return torch.stack([value * scale, torch.zeros_like(value)])


def taken(x: Tensor, start: int, count: int, filled: int) -> Tensor:
    """The tokens of a chunk, padded with zeros to ``filled``; the padding does not count."""
    rows = x[start : start + count]
    if count == filled:
        return rows
    more = x.new_zeros(filled, *x.shape[1:])
    more[:count] = rows
    return more


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write the output of a linear layer into ``out``, and return it."""
    if bias is None:
        return torch.mm(hidden, weight.T, out=out)
    return torch.addmm(bias, hidden, weight.T, out=out)  # rounds once, as a linear layer does


def _fake(*args: Any) -> tuple[Tensor, ...]:
    call = HeadCall(*args)
    shapes = (("h", call.h.shape), ("w", call.w.shape), ("b", call.w.shape[:1]))
    gradients = [call.h.new_empty(s if name in call.needs else (0,)) for name, s in shapes]
    return call.settings.new_empty(()), call.settings.new_empty(2), *gradients


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = HeadCall(*inputs)
    ctx.needs, ctx.others = call.needs, len(call.others)
    ctx.save_for_backward(*output[2:])
    ctx.set_materialize_grads(False)


def _scale(ctx: Any, of_total: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Scale the gradients that the forward has formed."""
    require_first_order()
    grads: list[Tensor | None] = [None, None, None]
    if of_total is not None:
        for i, (name, saved) in enumerate(zip("hwb", ctx.saved_tensors, strict=True)):
            grads[i] = scaled(saved, of_total) if name in ctx.needs else None
    rest: list[Any] = [None] * (len(HeadCall._fields) - len(grads))
    rest[HeadCall._fields.index("others") - len(grads)] = [None] * ctx.others
    return (*grads, *rest)


vocab_operator.register_fake(_fake)
vocab_operator.register_autograd(_scale, setup_context=_save)

# The operator as the target of graph nodes.
HEAD = torch.ops.fxdistill.vocab_loss.default
