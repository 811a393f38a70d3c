"""The loop over chunks for students that teach each other, as one opaque operator.

Every student's logits are what the others learn from. So a chunk has the logits of all students at
once: each head is applied once, forward and backward, as if its student learned alone. It is opaque
for the reasons of ``operator.py``.

Private to torch and used here only: ``_AutoDispatchBelowADInplaceOrView`` (see ``operator.py``).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxdistill.base.nodes import own_code
from fxdistill.losses.fused.call import HeadSide, HeadTerms
from fxdistill.losses.fused.chunk import Chunk
from fxdistill.losses.fused.gradients import (
    gradients_wanted,
    require_first_order,
    require_indices,
    scaled,
)
from fxdistill.losses.fused.head_gradients import HeadGradients
from fxdistill.losses.fused.operator import project, taken
from fxdistill.losses.fused.peer_chunk import PeerSpec, peer_terms
from fxdistill.losses.fused.sizes import BODY, size_of_chunks, sizes_on
from fxdistill.losses.fused.teachers import packed, unpacked

Body = Callable[[list[Chunk], list[Tensor]], Tensor]


class PeerCall(NamedTuple):
    """The arguments of ``fxdistill::peer_vocab_loss``, in its order; see there for shapes."""

    heads: Any
    labels: Any
    logit_shares: Any
    label_shares: Any
    settings: Any
    mixtures: Any
    spec: str
    chunk: int
    needs: str
    compiled: bool

    @classmethod
    def make(
        cls,
        sides: Sequence[HeadSide],
        terms: Sequence[HeadTerms],
        mixtures: Sequence[Tensor],
        spec: PeerSpec,
        chunk: int,
    ) -> "PeerCall":
        """Make the call from the heads, flattened to ``[tokens, ...]``, and their terms."""
        some = terms[0].labels
        labels = [] if some is None else [of.labels for of in terms]
        of_logits, of_labels = zip(*(of.shares for of in terms), strict=True)
        settings = torch.stack([of.settings for of in terms])
        needs = ",".join(gradients_wanted(*side) for side in sides)
        given = (labels, list(of_logits), list(of_labels), settings, list(mixtures))
        return cls(packed(sides), *given, spec.text, chunk, needs, terms[0].compiled)


@functools.cache
def _body(spec: PeerSpec, want_gradient: bool, compiled: bool) -> Body:
    """The body of a chunk for one ``spec``; compiled if ``compiled``."""

    def body(chunks: list[Chunk], mixtures: list[Tensor]) -> Tensor:
        return peer_terms(chunks, mixtures, spec, want_gradient)

    return torch.compile(own_code(body), fullgraph=True, dynamic=False) if compiled else body


@torch.library.custom_op("fxdistill::peer_vocab_loss", mutates_args=())
def peer_operator(
    heads: Sequence[Tensor],
    labels: Sequence[Tensor],
    logit_shares: Sequence[Tensor],
    label_shares: Sequence[Tensor],
    settings: Tensor,
    mixtures: Sequence[Tensor],
    spec: str,
    chunk: int,
    needs: str,
    compiled: bool,
) -> list[Tensor]:
    """Total, terms ``[K, 2]``, and of each head the total's gradients by its three operands.

    ``heads`` are hidden state ``[T, D]``, weight ``[V, D]`` and bias ``[V]`` (empty: none) of each
    of the K students; ``labels`` and the shares ``[T]`` of each. ``settings`` ``[K, 3]`` are the
    weights of both terms and τ, ``mixtures`` the weights of each student's peers. ``needs`` names
    the gradients of each head by the letters h, w and b, with commas; the others are empty.
    """
    call = PeerCall(
        *(heads, labels, logit_shares, label_shares, settings, mixtures),
        *(spec, chunk, needs, compiled),
    )
    for side, own in zip(unpacked(heads), labels, strict=False):
        require_indices("label", own, side.weight.shape[0])
    return _Loop(call).run()


class _Loop:
    """The buffers of all students, and the gradients that the chunks add to."""

    def __init__(self, call: PeerCall) -> None:
        self.call, self.sides = call, unpacked(call.heads)
        h = self.sides[0].hidden
        self.tokens = h.shape[0]
        self.size, self.rows = size_of_chunks(call.chunk, h), sizes_on(h.device).rows
        self.buffers = [s.hidden.new_empty(self.size, s.weight.shape[0]) for s in self.sides]
        needs = call.needs.split(",")
        self.formed = [HeadGradients(s, n) for s, n in zip(self.sides, needs, strict=True)]
        self.body = _body(PeerSpec.read(call.spec), any(needs), call.compiled)

    def run(self) -> list[Tensor]:
        """Run all chunks; return total, terms and gradients."""
        settings = self.call.settings
        # Dynamo guards on autograd's dispatch keys: see ``operator.py``.
        with torch.no_grad(), torch._C._AutoDispatchBelowADInplaceOrView():
            terms = settings.new_zeros(len(self.sides), 2)
            for start in range(0, self.tokens, self.size):
                terms += self._step(start)
            total = (settings[:, :2] * terms).sum()
            return [total, terms, *(x for formed in self.formed for x in formed.all())]

    def _step(self, start: int) -> Tensor:
        """Run one chunk and return the terms ``[K, 2]``."""
        count = min(self.size, self.tokens - start)
        filled = -(-count // self.rows) * self.rows
        of_chunk = functools.partial(taken, start=start, count=count, filled=filled)
        hidden = [of_chunk(side.hidden) for side in self.sides]
        chunks = [self._chunk(i, h, of_chunk) for i, h in enumerate(hidden)]
        mixtures = list(self.call.mixtures)
        each = [
            self.body([c.rows(some, some + self.rows) for c in chunks], mixtures)
            for some in range(0, filled, self.rows)
        ]
        for formed, c, h in zip(self.formed, chunks, hidden, strict=True):
            formed.add(c.student, h, c.live, start, count)
        return torch.cat(each, -1).sum(-1)

    def _chunk(self, i: int, hidden: Tensor, of_chunk: Callable[[Tensor], Tensor]) -> Chunk:
        """The tokens of a chunk with student ``i``'s logits."""
        call, side = self.call, self.sides[i]
        z = project(hidden, side.weight, side.bias, self.buffers[i][: len(hidden)])
        labels = of_chunk(call.labels[i]) if call.labels else None
        shares = of_chunk(call.logit_shares[i]), of_chunk(call.label_shares[i])
        return Chunk(z, None, None, labels, *shares, call.settings[i])


def _fake(*args: Any) -> list[Tensor]:
    call = PeerCall(*args)
    found = [call.settings.new_empty(()), call.settings.new_empty(call.settings.shape[0], 2)]
    for side, needs in zip(unpacked(call.heads), call.needs.split(","), strict=True):
        shapes = (("h", side.hidden.shape), ("w", side.weight.shape), ("b", side.weight.shape[:1]))
        found += [side.hidden.new_empty(s if name in needs else (0,)) for name, s in shapes]
    return found


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    call = PeerCall(*inputs)
    ctx.wanted = [name in needs for needs in call.needs.split(",") for name in "hwb"]
    ctx.lists = {i: len(x) for i, x in enumerate(call) if isinstance(x, (list, tuple))}
    ctx.save_for_backward(*output[2:])
    ctx.set_materialize_grads(False)


def _scale(ctx: Any, gradients: Sequence[Tensor | None] | None) -> tuple[Any, ...]:
    """Scale the gradients that the forward has formed."""
    require_first_order()
    of_total = gradients[0] if gradients else None
    rest: list[Any] = [None] * len(PeerCall._fields)
    for i, count in ctx.lists.items():
        rest[i] = [None] * count
    if of_total is not None:
        saved = zip(ctx.saved_tensors, ctx.wanted, strict=True)
        rest[0] = [scaled(x, of_total) if wanted else None for x, wanted in saved]
    return tuple(rest)


peer_operator.register_fake(_fake)
peer_operator.register_autograd(_scale, setup_context=_save)

# The operator as the target of graph nodes.
PEERS = torch.ops.fxdistill.peer_vocab_loss.default


def peer_flops(*args: Any) -> int:
    """FLOPs of the operator: each student's logits, and the gradients that are asked for."""
    call, flops = PeerCall(*args), 0
    for side, needs in zip(unpacked(call.heads), call.needs.split(","), strict=True):
        products = 1 + ("h" in needs) + ("w" in needs)
        flops += products * 2 * side.hidden.numel() * side.weight.shape[0]
    return int(flops)


def peer_bytes(*args: Any) -> int:
    """Bytes that the operator allocates within: a chunk's logits, and wide sums of gradients."""
    call, found = PeerCall(*args), 0
    for side, needs in zip(unpacked(call.heads), call.needs.split(","), strict=True):
        h, w = side.hidden, side.weight
        kind = 8 if h.dtype == torch.float64 else 4
        found += size_of_chunks(call.chunk, h) * w.shape[0] * h.element_size()
        if not call.compiled:
            found += BODY * sizes_on(h.device).rows * w.shape[0] * kind
        if "w" in needs and kind != w.element_size():
            found += w.numel() * kind
    return int(found)
