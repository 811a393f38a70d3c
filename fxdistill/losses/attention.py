"""Losses of attention: how student and teacher mix tokens.

``student`` and ``teacher`` are maps a ``[B, H, Q, K]`` (of queries and keys, a row sums to 1), or
``Attention``: queries, keys and mask, from which maps are formed a block of queries at a time, so
that none exists as a whole. The mean is over samples, heads and queries. ``weights`` are those of
the queries, ``[B, Q]``, or of samples, ``[B]``. A query that a model lets attend no key has weight
0, and a key that is masked has no part; of a given map, these are the keys where it is 0. Where
nothing counts, the value is 0 with zero gradients. Dropout has no part.

Heads are compared one by one, h with h; where their numbers differ, the means of the maps over
heads are (``heads="mean"``). A list of pairs, (student's, teacher's), says otherwise.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fxdistill.base.attention import Attention
from fxdistill.base.figures import number, shown
from fxdistill.base.nodes import one_node
from fxdistill.base.tensors import on_every_rank, wide
from fxdistill.errors import OptionError, ShapeError
from fxdistill.losses.attention_blocks import (
    Kind,
    Operand,
    Rows,
    block_loss,
    compared,
    kept_of,
    norms,
)
from fxdistill.losses.reduce import counted, weighted_mean

Heads = Literal["mean"] | Sequence[tuple[int, int]] | None


def attention_kl(
    student: Tensor | Attention,
    teacher: Tensor | Attention,
    weights: Tensor | None = None,
    *,
    heads: Heads = None,
) -> Tensor:
    """The mean over queries of KL(a_T ‖ a_S) = Σ a_T·log(a_T / a_S), over the teacher's keys.

    This is the divergence of MiniLM (Wang et al., 2020). Nothing is renormalised where masks
    differ. Keys that the student alone attends are not in the sum, but have their share of a_S. A
    key that the student's mask hides has no part: its a_S is 0 whatever the student learns, and the
    divergence would be infinite. Raises ShapeError where queries, keys, weights or a mask do not
    fit, OptionError for wrong ``heads``.
    """
    return _loss(student, teacher, weights, "kl", heads)


def attention_mse(
    student: Tensor | Attention,
    teacher: Tensor | Attention,
    weights: Tensor | None = None,
    *,
    scores: bool = False,
    heads: Heads = None,
) -> Tensor:
    """The mean over queries of the mean over keys of (a_S - a_T)², of keys that a model attends.

    ``scores=True`` compares the scores before softmax instead, with what masks add to them, over
    keys that neither masks (TinyBERT, Jiao et al., 2020); tensors are then scores, where a masked
    key has -∞ or nearly that. Raises ShapeError where queries, keys, weights or a mask do not fit,
    OptionError for wrong ``heads``.
    """
    return _loss(student, teacher, weights, "scores" if scores else "maps", heads)


def transfer_matrix(
    student: Tensor | Attention,
    teacher: Tensor | Attention,
    weights: Tensor | None = None,
    *,
    heads: Heads = None,
) -> Tensor:
    """The mean over samples and heads of ‖A_S - A_T‖/L, of matrices A that mix L tokens.

    This is the first stage of MOHAWK (Bick et al., 2024). A is the map of attention, or any matrix
    ``[B, H, L, L]``: what a state-space mixer does to its tokens. The norm is that of the rows that
    count, and L is their number; weights act relative to their mean in a sample, which weighs the
    sample. Raises ShapeError where queries, keys, weights or a mask do not fit, OptionError for
    wrong ``heads``.
    """
    return _loss(student, teacher, weights, "frobenius", heads)


def relation_kl(
    student: Tensor | Attention,
    teacher: Tensor | Attention,
    weights: Tensor | None = None,
    *,
    heads: int | None = None,
    of: Literal["q", "k", "v"] = "q",
) -> Tensor:
    """``attention_kl`` of relations softmax(h hᵀ/√d), with h the queries, keys or values (``of``).

    The source is MiniLMv2 (Wang et al., 2021). All heads are joined and cut anew into ``heads``, of
    width d: by default the smaller of both numbers of heads, so that widths and heads may differ.
    Heads of keys that serve several of queries are repeated first. The masks are the models' own,
    without what they add to scores. Tensors are hidden states ``[B, L, D]``, need ``heads=``, and
    tokens of weight 0 are no keys. It is formed a block of queries at a time. Raises ShapeError
    where tokens differ or ``heads`` do not divide a width, and for attention to other tokens.
    """
    if of not in ("q", "k", "v"):
        raise OptionError(f"of={of!r}: 'q', 'k' or 'v'")
    sides = [_hidden(x, of) for x in (student, teacher)]
    if heads is None:
        if not all(isinstance(x, Attention) for x in (student, teacher)):
            raise OptionError("relation_kl of hidden states [B, L, D] needs heads=, their number")
        heads = min(int(x.query.shape[1]) for x in (student, teacher) if isinstance(x, Attention))
    s = _relation(student, sides[0], heads, weights)
    t = _relation(teacher, sides[1], heads, weights)
    return _loss(s, t, weights, "kl", None)


def _hidden(x: Tensor | Attention, of: str) -> Tensor:
    """Hidden states ``[B, L, D]``: those given, or the joined heads of queries, keys or values."""
    if isinstance(x, Tensor):
        if x.ndim != 3:
            raise ShapeError(f"relation_kl compares hidden states [B, L, D], not {shown(x.shape)}")
        return on_every_rank(x)
    require_parts(x)
    value = {"q": x.query, "k": x.key, "v": x.value}[of]
    if x.query.shape[2] != x.key.shape[2]:
        raise ShapeError(
            f"relation_kl is of tokens that attend each other, and {number(x.query.shape[2])} "
            f"queries attend {number(x.key.shape[2])} keys: use attention_kl for cross-attention"
        )
    heads, few = x.query.shape[1], value.shape[1]
    if few != heads:
        value = value.repeat_interleave(heads // few, 1)
    return on_every_rank(value).transpose(1, 2).flatten(2)


def _relation(
    x: Tensor | Attention, hidden: Tensor, heads: int, weights: Tensor | None
) -> Attention:
    batch, length, width = hidden.shape
    if weights is not None:
        _require_queries(weights, batch, length)  # they make a mask here
    if heads < 1 or width % heads:
        raise ShapeError(f"heads={heads} do not divide a width of {width}: relation_kl cuts it")
    cut = hidden.reshape(batch, length, heads, width // heads).transpose(1, 2)
    if isinstance(x, Attention):
        mask = None if x.mask is None else _kept(on_every_rank(x.mask))
        return Attention(cut, cut, cut, mask, x.causal)
    counted = None if weights is None or weights.ndim != 2 else (weights != 0)[:, None, None]
    return Attention(cut, cut, cut, counted)


def _kept(mask: Tensor) -> Tensor:
    """A mask as truth values, for any head: what it adds to scores is left out."""
    if mask.dtype != torch.bool:
        mask = mask > torch.finfo(mask.dtype).min / 2
    return mask.any(-3, keepdim=True) if mask.ndim > 2 and mask.shape[-3] > 1 else mask


# ---- one place for both ways


def _loss(
    student: Tensor | Attention,
    teacher: Tensor | Attention,
    weights: Tensor | None,
    kind: Kind,
    heads: Heads,
) -> Tensor:
    shapes = [map_shape(x) for x in (student, teacher)]
    if (wrong := shapes_problem(*shapes)) is not None:
        raise wrong
    pairs = paired_heads(shapes[0][1], shapes[1][1], heads)
    if isinstance(student, Tensor) and isinstance(teacher, Tensor):
        return _of_maps(on_every_rank(student), on_every_rank(teacher), weights, kind, pairs)
    if kind == "scores" and not (isinstance(student, Attention) and isinstance(teacher, Attention)):
        raise OptionError("scores=True compares scores, and one side is a map, which has none")
    given = [*_parts(student), *_parts(teacher)]
    return _in_blocks(*given, weights, kind, pairs)


def map_shape(x: Tensor | Attention) -> tuple[int, int, int, int]:
    """The shape ``[B, H, Q, K]`` of a map, whether it exists or not."""
    if isinstance(x, Attention):
        require_parts(x)
        return (*x.query.shape[:3], x.key.shape[2])
    if x.ndim != 4:
        raise ShapeError(f"a map of attention is [B, heads, queries, keys], not {shown(x.shape)}")
    batch, heads, queries, keys = x.shape
    return batch, heads, queries, keys


def require_parts(x: Attention) -> None:
    """Raise ShapeError where queries, keys, values and mask are not those of one map."""
    query, key, value = x.query.shape, x.key.shape, x.value.shape
    fit = len(query) == len(key) == len(value) == 4 and query[0] == key[0] == value[0]
    fit = fit and query[3] == key[3] and key[2] == value[2]
    if not fit or query[1] % key[1] or query[1] % value[1]:
        raise ShapeError(
            f"attention of queries {list(query)}, keys {list(key)} and values {list(value)}: they "
            "are [B, H, Q, D], [B, h, K, D] and [B, h, K, *], and h divides H"
        )
    if x.mask is not None:
        grid, mask = [*query[:3], key[2]], x.mask.shape
        over = grid[len(grid) - len(mask) :]
        if len(mask) > 4 or any(m not in (1, n) for m, n in zip(mask, over, strict=True)):
            raise ShapeError(f"a mask {list(mask)} does not broadcast to the map {grid}")


def shapes_problem(student: Sequence[int], teacher: Sequence[int]) -> ShapeError | None:
    """The error for maps of other samples, queries or keys."""
    names = ("samples", 0), ("queries", 2), ("keys", 3)
    apart = [(name, student[i], teacher[i]) for name, i in names if student[i] != teacher[i]]
    wrong = [f"{name} {number(ours)} and {number(theirs)}" for name, ours, theirs in apart]
    if not wrong:
        return None
    return ShapeError(
        f"the student's attention is {shown(student)} and the teacher's {shown(teacher)} "
        f"([B, heads, queries, keys]): {', '.join(wrong)} must be equal"
    )


def paired_heads(student: int, teacher: int, heads: Heads) -> list[int]:
    """The heads that are compared, student's and teacher's in turn; none for means over heads."""
    if heads is None:
        return [i for h in range(student) for i in (h, h)] if student == teacher else []
    if isinstance(heads, str):
        if heads == "mean":
            return []
    elif pairs := [tuple(pair) for pair in heads if isinstance(pair, (tuple, list))]:
        fits = all(len(p) == 2 and 0 <= p[0] < student and 0 <= p[1] < teacher for p in pairs)
        if fits and len(pairs) == len(heads):
            return [int(i) for pair in pairs for i in pair]
    raise OptionError(
        f"heads={heads!r}: 'mean', or a list of pairs (student's head of {student}, teacher's of "
        f"{teacher}), counted from 0"
    )


def _parts(x: Tensor | Attention) -> Operand:
    """Tensors alone, so that a graph has them as arguments of one node."""
    if isinstance(x, Tensor):
        x = on_every_rank(x)
        none = x.new_zeros(())
        return Operand(x, x.new_zeros(0), none.bool(), none.bool(), none)
    query, key = on_every_rank(x.query), on_every_rank(x.key)
    mask = query.new_ones((1, 1, 1, 1), dtype=torch.bool) if x.mask is None else x.mask
    causal, scale = x.causal, query.shape[-1] ** -0.5 if x.scale is None else x.scale
    if not isinstance(causal, Tensor):
        causal = query.new_full((), causal, dtype=torch.bool)
    if not isinstance(scale, Tensor):
        scale = wide(query.new_empty(())).new_full((), scale)
    return Operand(query, key, on_every_rank(mask), causal, scale)


def _of_queries(weights: Tensor | None, like: Tensor) -> Tensor:
    """Weights ``[B, Q]`` from none, or from those of samples."""
    grid = like.shape[0], like.shape[2]
    if weights is None:
        return like.new_ones(grid, dtype=wide(like.new_empty(())).dtype)
    _require_queries(weights, *grid)
    return weights if weights.ndim == 2 else weights.unsqueeze(1).expand(grid)


def _require_queries(weights: Tensor, samples: int, queries: int) -> None:
    """Raise ShapeError unless ``weights`` are those of queries, ``[B, Q]``, or of samples."""
    if tuple(weights.shape) not in ((samples, queries), (samples,)):
        raise ShapeError(
            f"weights {shown(weights.shape)} of maps with {number(queries)} queries in "
            f"{number(samples)} samples: they are [B, Q] or [B]"
        )


@one_node
def _in_blocks(*args: Any) -> Tensor:
    """The loss from queries and keys: five tensors a side, weights, kind, and pairs of heads."""
    student, teacher = Operand(*args[:5]), Operand(*args[5:10])
    weights, kind, pairs = args[10:]
    return block_loss(student, teacher, _of_queries(weights, student.query), kind, pairs)


@one_node
def _of_maps(
    student: Tensor, teacher: Tensor, weights: Tensor | None, kind: Kind, pairs: list[int]
) -> Tensor:
    """The loss between maps that exist, which autograd differentiates."""
    of_queries = _of_queries(weights, student).unsqueeze(1)
    s, t = (
        _rows(counted(x, of_queries), kind, pairs[i::2]) for i, x in enumerate((student, teacher))
    )
    found, counts = _values(s, t, kind)
    w = of_queries.to(found.dtype) * counts
    if kind != "frobenius":
        return weighted_mean(found, w)
    squares = torch.where(w != 0, w * found, 0).sum(-1)
    return norms(squares, w.sum(-1), (w != 0).sum(-1))[0]


def _rows(x: Tensor, kind: Kind, heads: list[int]) -> Rows:
    x = wide(x)
    x = torch.where(x.isnan(), 0, x)
    kept = kept_of(x, kind)
    x = torch.where(kept, x, 0)
    if heads and heads != list(range(x.shape[1])):
        x, kept = x[:, heads], kept[:, heads]
    elif not heads:
        x = x.mean(1, keepdim=True)
        kept = (torch.all if kind == "scores" else torch.any)(kept, 1, keepdim=True)
    if kind == "kl":
        x = torch.where(kept, x, 1).log()
    return Rows(x, kept, x)


def _values(s: Rows, t: Rows, kind: Kind) -> tuple[Tensor, Tensor]:
    found, counts, _ = compared(s, t, kind)
    return found, counts
