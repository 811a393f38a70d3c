"""The vocabulary heads of students that teach each other, with their losses, in one.

Each student's logits are the target of the others. ``vocab_loss`` for each of them would apply
every head once for each student that reads it. Here a chunk of tokens has the logits of all
students, so that every head is applied once, and no logits outlive their chunk.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fxdistill.base.figures import shown
from fxdistill.errors import OptionError, ShapeError, VocabularyError
from fxdistill.losses.fused.call import HeadSide
from fxdistill.losses.fused.cast import cast_learning
from fxdistill.losses.fused.chunk import ChunkSpec
from fxdistill.losses.fused.mix import DivergenceLike, divergences
from fxdistill.losses.fused.peer_chunk import PeerSpec, PooledPeers
from fxdistill.losses.fused.peer_operator import PeerCall, peer_operator
from fxdistill.losses.fused.request import (
    HeadRequest,
    cap_of,
    check_bias,
    check_shapes,
    flat,
    require_constants,
    terms_of,
)
from fxdistill.losses.fused.sizes import chunk_tokens_for


class Peer(NamedTuple):
    """One student: its head, and what it learns from. All as in ``vocab_loss``, but for ``peers``.

    ``hidden`` ``[..., D]``, ``weight`` ``[V, D]``, ``bias`` ``[V]``; ``peers`` are the numbers of
    the students whose mean it learns from, ``shares`` their weights in it (``None``: equal).
    ``weights`` and ``num_items`` are those of the label loss, ``logit_weights`` and ``logit_items``
    those of the divergence.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    peers: tuple[int, ...] = ()
    shares: Tensor | None = None
    divergence: DivergenceLike = "forward_kl"
    logit_weight: float | Tensor = 1.0
    logit_weights: Tensor | None = None
    logit_items: float | Tensor | None = None
    temperature: float | Tensor = 1.0
    vocab_size: int | None = None
    labels: Tensor | None = None
    label_weight: float | Tensor = 1.0
    weights: Tensor | None = None
    num_items: float | Tensor | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0


class PeerLosses(NamedTuple):
    """``loss``: the weighted total. The others ``[K]``: each student's terms, without gradient."""

    loss: Tensor
    logits: Tensor
    labels: Tensor


def vocab_loss_of_peers(
    students: Sequence[Peer],
    *,
    pooled: PooledPeers = "logits",
    chunk_tokens: int | None = None,
    compile: bool = True,
) -> PeerLosses:
    """Σ over students of logit_weight · divergence + label_weight · cross entropy (DML).

    The divergence compares a student's logits with those of the mean of its peers
    (``mean_of_teachers``), to which it gives no gradient: Zhang et al., "Deep mutual learning"
    (2018), whose form ``pooled="each"`` is. Equal to the plain losses of logits, value and
    gradient.

    Args:
        students: Two or more, on the same tokens: hidden states ``[..., D_i]`` of one grid.
        pooled: What a target is the mean of, as in ``mean_of_teachers``; with ``"each"``, the term
            is the mean of the divergences from each peer.
        chunk_tokens: As in ``vocab_loss``.
        compile: As in ``vocab_loss``.

    Raises:
        ShapeError: Hidden states, heads, labels or weights do not fit each other.
        VocabularyError: ``vocab_size`` is larger than a vocabulary that is compared.
        OptionError: Students differ in dtype or are float16, some have labels and others not, a
            divergence is unknown or has no peers, or an argument requires a gradient that it would
            not get.
    """
    grid = students[0].hidden.shape[:-1]
    for i, s in enumerate(students):
        check_shapes(s.hidden, s.weight, None, None, s.labels, s.weights, s.logit_weights)
        check_bias(f"student {i}'s ", s.bias, s.weight)
        if s.hidden.shape[:-1] != grid:
            raise ShapeError(
                f"student {i}'s hidden state is {shown(s.hidden.shape)}, the first student's "
                f"{shown(students[0].hidden.shape)}: peers see the same tokens"
            )
    sides = [flat(cast_learning(HeadSide(s.hidden, s.weight, s.bias))) for s in students]
    if len({side.hidden.dtype for side in sides}) > 1:
        raise OptionError("peers differ in dtype: use losses of logits, or one dtype for all")
    if len({s.labels is None for s in students}) > 1:
        raise OptionError("some students have labels and others not: give them to all or to none")
    specs = tuple(_spec(s, i, students) for i, s in enumerate(students))
    asked = [_request(s, spec, compile) for s, spec in zip(students, specs, strict=True)]
    terms = [terms_of(of, side.hidden) for of, side in zip(asked, sides, strict=True)]
    like = terms[0].settings
    mixtures = [
        like.new_ones(len(s.peers)) if s.shares is None else s.shares.detach() for s in students
    ]
    h, columns = sides[0].hidden, sum(side.weight.shape[0] for side in sides)
    chunk = chunk_tokens or chunk_tokens_for(columns, h.element_size(), h.device)
    spec = PeerSpec(specs, tuple(s.peers for s in students), pooled)
    total, each, *_ = peer_operator(*PeerCall.make(sides, terms, mixtures, spec, chunk))
    of_logits, of_labels = each.detach().unbind(1)
    return PeerLosses(total, of_logits, of_labels)


def _spec(s: Peer, i: int, students: Sequence[Peer]) -> ChunkSpec:
    """The constants of one student's terms."""
    chosen = divergences(s.divergence)
    if chosen and (not s.peers or i in s.peers or max(s.peers) >= len(students)):
        raise OptionError(
            f"student {i} has peers={s.peers}: the numbers of other students, of {len(students)}"
        )
    sizes = [s.weight.shape[0], *(students[j].weight.shape[0] for j in s.peers)]
    if s.vocab_size is not None and s.vocab_size > min(sizes):
        raise VocabularyError(f"vocab_size={s.vocab_size}, but there are {min(sizes)} columns")
    return ChunkSpec(
        chosen,
        min(sizes) if s.vocab_size is None else s.vocab_size,
        (float(s.scale), 1.0),
        (cap_of(s.softcap), None),
        float(s.label_smoothing),
        float(s.z_loss),
        s.labels is not None,
    )


def _request(s: Peer, spec: ChunkSpec, compiled: bool) -> HeadRequest:
    """What the head computes for one student."""
    numbers = (s.logit_weight, s.label_weight, s.temperature)
    counts = (s.weights, s.num_items, s.logit_weights, s.logit_items)
    require_constants(*counts, *numbers)
    return HeadRequest(s.labels, *counts, numbers, spec, None, compiled)
