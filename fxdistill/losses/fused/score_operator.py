"""Scores from hidden states and heads: a loop over chunks of tokens, as one opaque operator.

It is opaque for the reasons of ``operator.py``, whose chunks it has. Only the heads that a score
reads are applied, and nothing is kept but the scores.

Private to torch and used here only: ``_AutoDispatchBelowADInplaceOrView`` (see ``operator.py``).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxdistill.base.nodes import own_code
from fxdistill.losses import fused
from fxdistill.losses.fused.call import HeadSide, Shard
from fxdistill.losses.fused.chunk import ChunkSpec
from fxdistill.losses.fused.operator import project, taken
from fxdistill.losses.fused.scores import Names, Sides, scored, sides_of
from fxdistill.losses.fused.sizes import chunk_tokens_for, size_of_chunks, sizes_on

Body = Callable[[Sides, Tensor, Tensor], Tensor]  # of the outputs of the heads' weights


@functools.cache
def _body(names: Names, shape: ChunkSpec, compiled: bool) -> Body:
    def body(raw: Sides, live: Tensor, tau: Tensor) -> Tensor:
        return scored(sides_of(raw, live, tau, shape), names, shape.mix(tau))

    if not compiled:
        return body
    return torch.compile(own_code(body), fullgraph=True, dynamic=False)


@dataclass(frozen=True)
class ScoreCall:
    """What the operator is to compute; a side that no score reads is ``None``.

    ``live`` ``[T]`` says which tokens count. ``chunk`` is the number of tokens in a chunk, ``None``
    for one that suits the device.
    """

    sides: tuple[HeadSide | None, ...]
    live: Tensor
    tau: Tensor
    names: Names
    shape: ChunkSpec
    chunk: int | None
    compiled: bool
    shard: Shard | None = None

    @property
    def given(self) -> list[HeadSide]:
        """The sides that are read."""
        return [side for side in self.sides if side is not None]

    def flat(self) -> "ScoreCall":
        """The same call with hidden states ``[T, D]``."""
        return replace(
            self,
            sides=tuple(
                None if side is None else side._replace(hidden=side.hidden.flatten(0, -2))
                for side in self.sides
            ),
        )

    def arguments(self) -> tuple[Any, ...]:
        """The arguments of the operator."""
        h = self.given[0].hidden
        columns = sum(side.weight.shape[0] for side in self.given)
        chunk = self.chunk or chunk_tokens_for(columns, h.element_size(), h.device)
        absent = (None, None, None)
        heads = [x for side in self.sides for x in (absent if side is None else side)]
        what = (self.live, self.tau, ",".join(self.names), self.shape.text, chunk, self.compiled)
        return (*heads, *what, *(self.shard or Shard())[:2])


@torch.library.custom_op("fxdistill::vocab_scores", mutates_args=())
def score_operator(
    h: Tensor | None,
    w: Tensor | None,
    bias: Tensor | None,
    t: Tensor | None,
    t_weight: Tensor | None,
    t_bias: Tensor | None,
    live: Tensor,
    tau: Tensor,
    names: str,
    spec: str,
    chunk: int,
    compiled: bool,
    group: str = "",
    offset: int = 0,
) -> Tensor:
    """The scores ``names`` (with commas) of each token, ``[T, n]``.

    Hidden states ``[T, D]``, weights ``[V, D]`` and biases ``[V]`` of both heads; a model that no
    score reads has none. ``live`` ``[T]`` says which tokens count. With ``group``, the name of a
    process group, weights are this rank's rows of a sharded vocabulary, from ``offset`` on.
    """
    shape, asked = ChunkSpec.read(spec), tuple(names.split(","))
    given = ((h, w, bias), (t, t_weight, t_bias))
    sides = [HeadSide(x, y, z) if x is not None and y is not None else None for x, y, z in given]
    one = next(side.hidden for side in sides if side is not None)
    size, rows = size_of_chunks(chunk, one), sizes_on(one.device).rows
    if group:
        body: Body = fused.sharded_scores.ShardedScores(asked, shape, group, offset)
        rows = size
    else:
        body = _body(asked, shape, compiled)
    buffers = [
        None if side is None else side.hidden.new_empty(size, side.weight.shape[0])
        for side in sides
    ]
    found = tau.new_empty(one.shape[0], len(asked))
    with torch.no_grad(), torch._C._AutoDispatchBelowADInplaceOrView():
        for start in range(0, one.shape[0], size):
            count = min(size, one.shape[0] - start)
            filled = -(-count // rows) * rows
            made: list[Tensor | None] = [None, None]
            for i, (side, buffer) in enumerate(zip(sides, buffers, strict=True)):
                if side is not None and buffer is not None:
                    hidden = taken(side.hidden, start, count, filled)
                    made[i] = project(hidden, side.weight, side.bias, buffer[:filled])
            counts = taken(live, start, count, filled)
            for some in range(0, filled, rows):
                raw = Sides(*(None if x is None else x[some : some + rows] for x in made))
                scores = body(raw, counts[some : some + rows], tau)
                end = min(start + some + rows, start + count)
                found[start + some : end] = scores[: end - start - some]
    return found


@score_operator.register_fake
def _(*args: Any) -> Tensor:
    live, tau, names = args[6:9]
    found: Tensor = tau.new_empty(live.shape[0], len(names.split(",")))
    return found


# The operator as the target of graph nodes.
SCORES = torch.ops.fxdistill.vocab_scores.default


def score_flops(*args: Any) -> int:
    """FLOPs of the operator: the logits of the models that are read."""
    heads = ((args[0], args[1]), (args[3], args[4]))
    return sum(2 * int(h.numel()) * int(w.shape[0]) for h, w in heads if h is not None)


def score_bytes(*args: Any) -> int:
    """Bytes that the operator allocates within: a chunk's logits."""
    heads = [(h, w) for h, w in ((args[0], args[1]), (args[3], args[4])) if h is not None]
    tokens = size_of_chunks(args[10], heads[0][0])
    return sum(tokens * int(w.shape[0]) * int(h.element_size()) for h, w in heads)
