"""Scores of predictions, from logits or from hidden states and heads; see ``fused/scores.py``.

A score has no gradient. The result is ``[..., n]`` for n scores, a plain tensor that is the same on
every rank. A token whose weight is 0 may hold anything.
"""

import ast
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxdistill import base
from fxdistill.base.nodes import one_node
from fxdistill.base.tensors import is_placed, wide
from fxdistill.losses import fused, sharded
from fxdistill.losses.fused.call import HeadSide
from fxdistill.losses.fused.cast import cast_side
from fxdistill.losses.fused.chunk import ChunkSpec
from fxdistill.losses.fused.formulas import Divergence
from fxdistill.losses.fused.score_operator import ScoreCall, score_operator
from fxdistill.losses.fused.scores import Sides, reads, scored, sides_of


class Asked(NamedTuple):
    """The scores to compute by name, and the divergences whose mix is the score "divergence"."""

    names: tuple[str, ...]
    divergences: tuple[Divergence, ...] = ()

    @property
    def text(self) -> str:
        """The scores as text: dynamo would make numbers symbolic."""
        return repr(tuple(self))

    @classmethod
    def read(cls, text: str) -> "Asked":
        """Read the scores from their ``text``."""
        return cls(*ast.literal_eval(text))


@one_node
def token_scores(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    asked: str,
    temperature: Tensor | float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """The scores of logits ``[..., V]``; ``asked`` is the text of ``Asked``."""
    names, divergences = Asked.read(asked)
    s, t = (
        x.detach() if read else None
        for x, read in zip((student_logits, teacher_logits), reads(names), strict=True)
    )
    one = t if s is None else s
    assert one is not None
    shape = ChunkSpec(divergences, one.shape[-1])
    if is_placed(one):
        of_shards: Tensor = sharded.scores.token_scores(s, t, names, shape, temperature, weights)
        return of_shards
    flat = Sides(*(None if x is None else wide(x).flatten(0, -2) for x in (s, t)))
    tau = torch.as_tensor(temperature, dtype=wide(one).dtype, device=one.device)
    live = _live(weights, one)
    found = scored(sides_of(flat, live, tau, shape), names, shape.mix(tau))
    return found.reshape(*one.shape[:-1], len(names))


def vocab_scores(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    asked: str,
    temperature: float | Tensor = 1.0,
    weights: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    compile: bool = True,
    **heads: Any,
) -> Tensor:
    """``token_scores`` of the logits that heads would make, a chunk of tokens at a time.

    The arguments are those of ``losses.vocab_loss``; ``heads`` are its biases, scales and softcaps.
    A head that no score reads is not applied.
    """
    names, divergences = Asked.read(asked)
    columns = min(student_weight.shape[0], teacher_weight.shape[0])
    shape = ChunkSpec(
        divergences,
        columns if vocab_size is None else vocab_size,
        (heads.get("student_scale", 1.0), heads.get("teacher_scale", 1.0)),
        (heads.get("student_softcap"), heads.get("teacher_softcap")),
    )
    given = (
        (student_hidden, student_weight, heads.get("student_bias")),
        (teacher_hidden, teacher_weight, heads.get("teacher_bias")),
    )
    sides = tuple(
        cast_side(HeadSide(h.detach(), w.detach(), None if b is None else b.detach()))
        if read
        else None
        for (h, w, b), read in zip(given, reads(names), strict=True)
    )
    one = next(side.hidden for side in sides if side is not None)
    placed = any(is_placed(x) for side in sides if side is not None for x in side[:2])
    local = base.placement.local_part(one) if placed else one
    weights = base.placement.whole(weights) if placed and weights is not None else weights
    kind = torch.float64 if one.dtype == torch.float64 else torch.float32
    tau = torch.as_tensor(temperature, dtype=kind, device=local.device).reshape(())
    call = ScoreCall(sides, _live(weights, one), tau, names, shape, chunk_tokens, compile)
    if placed:
        found: Tensor = fused.sharded_score_heads.vocab_scores(call)
    else:
        found = score_operator(*call.flat().arguments())
    return found.reshape(*one.shape[:-1], len(names))


def _live(weights: Tensor | None, one: Tensor) -> Tensor:
    """Which tokens of ``one`` ``[..., width]`` count, flattened."""
    if weights is None:
        return torch.ones(one.shape[:-1].numel(), dtype=torch.bool, device=one.device)
    return weights.detach().flatten() != 0
