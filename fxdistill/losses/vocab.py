"""The vocabulary head and its losses in one: logits exist for one chunk of tokens at a time.

In logit distillation the two ``[tokens, vocabulary]`` tensors, their log-softmaxes and gradients
fill the memory. Here a loop over chunks of tokens projects both hidden states, computes all terms
and the gradient by the student's logits in one pass, turns that into gradients by hidden state and
weight, and frees the chunk. The backward only scales these gradients. No tensor of size tokens ×
vocabulary is ever kept, in any precision.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxdistill import base
from fxdistill.base.figures import shown
from fxdistill.base.tensors import is_placed
from fxdistill.errors import OptionError, ShapeError, VocabularyError
from fxdistill.losses import fused
from fxdistill.losses.fused.call import HeadCall, HeadSide, Others, Stored
from fxdistill.losses.fused.cast import cast_learning, cast_side
from fxdistill.losses.fused.chunk import ChunkSpec
from fxdistill.losses.fused.mix import DivergenceLike, divergences, require_no_logits
from fxdistill.losses.fused.operator import vocab_operator
from fxdistill.losses.fused.request import (
    HeadRequest,
    cap_of,
    check_bias,
    check_head,
    check_shapes,
    flat,
    kept_tokens,
    require_constants,
    terms_of,
)
from fxdistill.losses.fused.sizes import chunk_tokens_for
from fxdistill.losses.fused.teachers import MixSpec, columns_of_mean, packed
from fxdistill.losses.mixture import Pooled

OtherTeacher = tuple[Tensor, Tensor, Tensor | None, float, float | None]


class VocabLoss(NamedTuple):
    """``loss``: the weighted total; ``logits``, ``labels``: its unweighted terms, no gradient."""

    loss: Tensor
    logits: Tensor
    labels: Tensor


def vocab_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    *,
    divergence: DivergenceLike = "forward_kl",
    logit_weight: float | Tensor = 1.0,
    label_weight: float | Tensor = 0.0,
    temperature: float | Tensor = 1.0,
    weights: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_tokens: int | None = None,
    num_items: float | Tensor | None = None,
    logit_weights: Tensor | None = None,
    logit_items: float | Tensor | None = None,
    keep: tuple[int, int] | None = None,
    score: str = "",
    vocab_size: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    other_teachers: Sequence[OtherTeacher] = (),
    teacher_shares: Tensor | None = None,
    pooled: Pooled = "probabilities",
    compile: bool = True,
) -> VocabLoss:
    """logit_weight · divergence + label_weight · cross entropy, from hidden states and heads.

    Equal to ``divergence(h W^T, h_T W_T^T, temperature=, weights=)`` and ``cross_entropy(h W^T,
    labels, weights=)`` of this package, value and gradient; see there for the formulas. Labels and
    predictions are aligned already: nothing is shifted.

    Args:
        student_hidden: ``[..., D]``, the input of the student's head.
        student_weight: ``[V, D]``, the weight of the student's head (tied or not). It may be a
            DTensor whose vocabulary is sharded (``Shard(0)``), like the teacher's: see
            ``losses.fused.sharded_heads``.
        teacher_hidden: ``[..., D_T]``; gets no gradient. ``None`` with ``divergence=None``.
        teacher_weight: ``[V_T, D_T]``; gets no gradient.
        labels: ``[...]``; -100 is ignored. Without labels there is no cross entropy.
        divergence: forward_kl, reverse_kl, jsd, soft_cross_entropy, total_variation, mse_logits,
            sigmoid_kl; one of these functions or a ``functools.partial`` of ``jsd`` with ``beta``;
            a mix, ``{"forward_kl": 0.5, ...}``; or ``None``.
        logit_weight: The weight of the divergence in the total. A tensor recompiles nothing.
        label_weight: The weight of the cross entropy.
        temperature: τ of the divergence, which carries τ² (see ``losses.logits``).
        weights: ``[...]``, the weight of each token in Σ w·value / Σ w.
        student_bias: ``[V]``.
        teacher_bias: ``[V_T]``; gets no gradient.
        chunk_tokens: The number of tokens in a chunk; ``None``: as many as fit 52 MiB of logits
            (768 MiB on a GPU), and 160 at least.
        num_items: The denominator of both terms in place of Σ w.
        logit_weights: ``[...]``, the weights of the tokens in the divergence, where these are
            others than ``weights``.
        logit_items: The denominator that goes with them, in place of their sum.
        keep: A share (numerator, denominator): at most ⌈share·tokens⌉ tokens have a weight, and the
            heads are applied to so many tokens only. Not with labels, nor on a sharded vocabulary.
        score: A score of ``fused.scores``, by which each token's weight is multiplied before the
            mean is taken. As for ``keep``, and without ``num_items``.
        vocab_size: How many columns the divergence compares; ``None``: the smaller vocabulary. The
            columns beyond have probability zero in both models.
        label_smoothing: ε of the cross entropy.
        z_loss: The multiple of lse² that is added to the cross entropy.
        student_scale: The factor that the student's head multiplies its logits by.
        teacher_scale: The factor of the teacher's head.
        student_softcap: The cap of the student's head, cap·tanh(logits / cap).
        teacher_softcap: The cap of the teacher's head.
        other_teachers: Further teachers, each ``(hidden, weight, bias, scale, softcap)``: the
            divergence compares with the mean of all (see ``losses.mean_of_teachers``).
        teacher_shares: ``[K]``, their weights, the first teacher's first; ``None``: equal.
        pooled: What the mean is of, as in ``mean_of_teachers``.
        compile: Compile the body of a chunk with Inductor.

    Raises:
        ShapeError: Hidden states, heads, labels or weights do not fit each other.
        VocabularyError: ``vocab_size`` is larger than a vocabulary, or sharded vocabularies are of
            different sizes on a rank.
        OptionError: The divergence is unknown or lacks its teacher, the student is float16, or
            an argument requires a gradient that gets none.
    """
    both = student_hidden, student_weight, teacher_hidden, teacher_weight
    check_shapes(*both, labels, weights, logit_weights)
    check_bias("student_", student_bias, student_weight)
    check_bias("teacher_", teacher_bias, teacher_weight)
    chosen = divergences(divergence)
    if chosen and (teacher_hidden is None or teacher_weight is None):
        raise OptionError(f"divergence={divergence!r} compares with a teacher, and none is given")
    columns = student_weight.shape[0]
    if teacher_weight is not None and chosen:
        known = [teacher_weight, *(other[1] for other in other_teachers)]
        columns = min(columns, *(weight.shape[0] for weight in known))
    if vocab_size is not None and vocab_size > columns:
        raise VocabularyError(f"vocab_size={vocab_size}, but there are {columns} common columns")
    curves = [(float(teacher_scale), cap_of(teacher_softcap))]
    curves += [(float(scale), cap_of(cap)) for *_, scale, cap in other_teachers]
    of_body = curves[0] if len(curves) == 1 else (1.0, None)  # mixed logits are behind the curves
    spec = ChunkSpec(
        chosen,
        columns if vocab_size is None else vocab_size,
        (float(student_scale), of_body[0]),
        (cap_of(student_softcap), of_body[1]),
        float(label_smoothing),
        float(z_loss),
        labels is not None,
        score,
    )
    numbers = (logit_weight, label_weight, temperature)
    of_logits = (weights, num_items) if logit_weights is None else (logit_weights, logit_items)
    asked = HeadRequest(
        labels, weights, num_items, *of_logits, numbers, spec, chunk_tokens, compile
    )
    require_constants(weights, num_items, *of_logits, *numbers)
    student = cast_learning(HeadSide(student_hidden, student_weight, student_bias))
    teacher = None
    if chosen and teacher_hidden is not None and teacher_weight is not None:
        bias = None if teacher_bias is None else teacher_bias.detach()
        teacher = cast_side(HeadSide(teacher_hidden.detach(), teacher_weight.detach(), bias))
    sides = [side for side in (student, teacher) if side is not None]
    behind = _others(teacher, other_teachers, teacher_shares, MixSpec(pooled, tuple(curves)))
    placed = any(is_placed(x) for side in sides for x in side[:2])
    if behind is not None and (placed or score or keep is not None):
        raise OptionError("several teachers: on one device, without score= and keep=")
    if score and (labels is not None or num_items is not None or placed):
        raise OptionError("score multiplies weights: give no labels, no num_items, no shards")
    if placed:
        return _sharded(student, teacher, asked)
    if keep is not None:
        if labels is not None or of_logits[0] is None:
            raise OptionError("keep leaves out tokens without a weight: give weights, no labels")
        student, teacher, asked = kept_tokens(student, teacher, asked, keep)
    student, teacher = flat(student), None if teacher is None else flat(teacher)
    columns = sum(side.weight.shape[0] for side in sides)
    if behind is not None:
        columns += sum(weight.shape[0] for weight in behind.heads[1::3])
        columns += columns_of_mean(spec.columns, student.hidden.element_size())
    return _run(student, teacher, asked, columns, behind)


def _others(
    first: HeadSide | None,
    others: Sequence[OtherTeacher],
    shares: Tensor | None,
    spec: MixSpec,
) -> Others | None:
    """The teachers behind the first as the operator takes them; ``None`` if there are none."""
    if not others:
        return None
    if shares is not None and shares.shape != (len(others) + 1,):
        raise ShapeError(f"teacher_shares {shown(shares.shape)} of {len(others) + 1} teachers")
    sides = []
    for hidden, weight, bias, *_ in others:
        check_head("the other teacher's ", hidden, weight)
        check_bias("the other teacher's ", bias, weight)
        if first is not None and hidden.shape[:-1] != first.hidden.shape[:-1]:
            raise ShapeError(
                f"the other teacher's hidden is {shown(hidden.shape)} and teacher_hidden "
                f"{shown(first.hidden.shape)}: of the same tokens"
            )
        bias = None if bias is None else bias.detach()
        sides.append(flat(cast_side(HeadSide(hidden.detach(), weight.detach(), bias))))
    like = sides[0].hidden
    shares = torch.ones(len(others) + 1, device=like.device) if shares is None else shares
    return Others(packed(sides), shares.detach(), spec.text)


def _run(
    student: HeadSide,
    teacher: HeadSide | Stored | None,
    asked: HeadRequest,
    columns: int,
    behind: Others | None = None,
) -> VocabLoss:
    """Run the operator on this device; ``columns`` logits of a token determine the chunk."""
    h = student.hidden
    chunk = asked.chunk or chunk_tokens_for(columns, h.element_size(), h.device)
    terms = terms_of(asked, h)
    total, each, *_ = vocab_operator(*HeadCall.make(student, teacher, terms, chunk, more=behind))
    return VocabLoss(total, each[0].detach(), each[1].detach())


def _sharded(student: HeadSide, teacher: HeadSide | None, asked: HeadRequest) -> VocabLoss:
    placement = base.placement
    tokens = student.hidden.shape[:-1].numel()
    like = placement.local_part(student.hidden.detach()).new_empty(tokens, 0)
    labels, weights, logit_weights = (
        None if x is None else placement.whole(x)
        for x in (asked.labels, asked.weights, asked.logit_weights)
    )
    asked = asked._replace(labels=labels, weights=weights, logit_weights=logit_weights)
    terms = terms_of(asked, like)
    total, each = fused.sharded_heads.sharded_vocab_loss(student, teacher, terms)
    return VocabLoss(total, each[0].detach(), each[1].detach())


def vocab_loss_topk(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: DivergenceLike = "forward_kl",
    logit_weight: float | Tensor = 1.0,
    label_weight: float | Tensor = 0.0,
    temperature: float | Tensor = 1.0,
    weights: Tensor | None = None,
    student_bias: Tensor | None = None,
    chunk_tokens: int | None = None,
    num_items: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    student_scale: float = 1.0,
    student_softcap: float | None = None,
    compile: bool = True,
) -> VocabLoss:
    """``vocab_loss`` against a teacher's stored output: its k best entries for each token.

    The divergence compares distributions over these k entries and one bucket for all others, whose
    probability is 1 minus theirs. For k = V it is the full divergence, for smaller k at most that.
    If the k probabilities sum to 1, ``reverse_kl`` is infinite, and ``forward_kl`` and ``jsd`` are
    finite.

    Args:
        student_hidden: ``[..., D]``.
        student_weight: ``[V, D]``.
        teacher_ids: ``[..., k]``, the token ids of the entries, each once.
        teacher_logprobs: ``[..., k]``, their log-probabilities over the teacher's whole vocabulary,
            at the same ``temperature``.
        labels: ``[...]``, and all else as in ``vocab_loss``.
        divergence: As in ``vocab_loss``, but for mse_logits and sigmoid_kl, which compare logits.
        logit_weight: Likewise.
        label_weight: Likewise.
        temperature: Likewise.
        weights: Likewise.
        student_bias: Likewise.
        chunk_tokens: Likewise.
        num_items: Likewise.
        label_smoothing: Likewise.
        z_loss: Likewise.
        student_scale: Likewise.
        student_softcap: Likewise.
        compile: Likewise.

    Raises:
        ShapeError: Hidden states, heads, ids, labels or weights do not fit each other.
        OptionError: The divergence is unknown or compares logits, the student is float16, or an
            argument requires a gradient that gets none.
    """
    check_shapes(student_hidden, student_weight, teacher_ids, None, labels, weights)
    check_bias("student_", student_bias, student_weight)
    if teacher_ids.shape != teacher_logprobs.shape:
        raise ShapeError(
            f"teacher_ids is {shown(teacher_ids.shape)}, teacher_logprobs "
            f"{shown(teacher_logprobs.shape)}: both [..., k]"
        )
    chosen = divergences(divergence)
    require_no_logits(chosen)
    numbers = (logit_weight, label_weight, temperature)
    require_constants(weights, num_items, *numbers)
    student = cast_learning(HeadSide(student_hidden.flatten(0, -2), student_weight, student_bias))
    spec = ChunkSpec(
        chosen,
        0,
        (float(student_scale), 1.0),
        (cap_of(student_softcap), None),
        float(label_smoothing),
        float(z_loss),
        labels is not None,
    )
    of_both = (weights, num_items)
    asked = HeadRequest(labels, *of_both, *of_both, numbers, spec, chunk_tokens, compile)
    stored = Stored(teacher_logprobs.detach().flatten(0, -2), teacher_ids.flatten(0, -2))
    columns = 2 * student_weight.shape[0]
    return _run(student, stored, asked, columns)
