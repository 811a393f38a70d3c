"""Losses between attention maps that no model makes: a block of queries at a time.

One operator takes queries, keys and masks of both models. It forms the maps of some queries, their
part of the loss and of its gradient, and forgets them: no ``[B, H, Q, K]`` outlives its block, in
forward and backward. Rows of all samples and heads go together.

In a block, x is what a loss compares: log a for the divergence, a for squares of maps, s for
scores. g is the slope of the loss by x; the slope by the scores is then g - a Σ_k g for log a, the
same with g·a for a, and g for s.

B batch, H heads, Q queries, K keys, D width of a head.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fxdistill.base.tensors import wide
from fxdistill.losses.gradient_in_forward import keeps_its_gradients, needed
from fxdistill.losses.reduce import counted

Kind = Literal["kl", "maps", "scores", "frobenius"]
Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
LETTERS = "qkmQKM"  # queries, keys and mask of the student, and of the teacher

BLOCK = 2**17  # numbers of a block of a small map; large ones have 256 blocks
BLOCKS = 256


class Rows(NamedTuple):
    """What one model compares in a block of queries.

    ``kept`` are the keys that are not masked, ``a`` the map (of a model that has queries and keys,
    which ``x`` is formed from).
    """

    x: Tensor
    kept: Tensor
    a: Tensor


class Operand(NamedTuple):
    """One model's side: queries, keys, and what else its map is made of.

    A ``key`` that has not four axes says that ``query`` is the map ``[B, H, Q, K]`` itself.
    """

    query: Tensor
    key: Tensor
    mask: Tensor
    causal: Tensor
    scale: Tensor

    @property
    def is_map(self) -> bool:
        """Whether the map is given."""
        return self.key.ndim != 4


def block_loss(
    student: Operand, teacher: Operand, weights: Tensor, kind: Kind, pairs: Sequence[int]
) -> Tensor:
    """The loss of ``kind``, for weights ``[B, Q]``.

    ``pairs`` are heads of student and teacher in turn; without any, the means over heads are
    compared.
    """
    learning = *student[:3], *teacher[:3]
    rest = (*student[3:], *teacher[3:], weights, kind, list(pairs))
    value: Tensor = _blocks(*learning, *rest, needed(*learning, letters=LETTERS))[0]
    return value


@torch.library.custom_op("fxdistill::attention_blocks", mutates_args=())
def _blocks(
    s_query: Tensor,
    s_key: Tensor,
    s_mask: Tensor,
    t_query: Tensor,
    t_key: Tensor,
    t_mask: Tensor,
    s_causal: Tensor,
    s_scale: Tensor,
    t_causal: Tensor,
    t_scale: Tensor,
    weights: Tensor,
    kind: str,
    pairs: list[int],
    needs: str,
) -> Seven:
    """The loss and its gradients by queries, keys and what the masks add, of both models."""
    with torch.no_grad():
        weights = weights.to(wide(s_query).dtype)
        student = Operand(s_query, s_key, s_mask, s_causal, s_scale)
        teacher = Operand(t_query, t_key, t_mask, t_causal, t_scale)
        sides = (
            _Side(student, weights, kind, pairs[::2], LETTERS[:3]),
            _Side(teacher, weights, kind, pairs[1::2], LETTERS[3:]),
        )
        for side in sides:
            side.start(needs)
        total = _frobenius if kind == "frobenius" else _mean
        value, factor = total(sides, weights, kind, needs)
        ours, theirs = (side.gradients(factor) for side in sides)
        return value, *ours, *theirs


keeps_its_gradients(_blocks, "a loss of attention maps", LETTERS)


def block_flops(*args: Any) -> int:
    """FLOPs of the operator: the scores of models that have no map, and the gradients wanted."""
    kind, _, needs = args[11:14]
    rounds = 2 if kind == "frobenius" and needs else 1
    total = 0
    for first, letters in ((0, LETTERS[:2]), (3, LETTERS[3:5])):
        query, key = args[first : first + 2]
        if key.ndim == 4:
            products = rounds + sum(letter in needs for letter in letters)
            total += products * 2 * int(query.numel()) * int(key.shape[2])
    return total


Sides = tuple["_Side", "_Side"]


def _mean(sides: Sides, weights: Tensor, kind: str, needs: str) -> tuple[Tensor, Tensor]:
    """The mean over counted queries, heads and samples, and the factor of its gradients."""
    value, items = weights.new_zeros(()), weights.new_zeros(())
    for at in _blocks_of(sides[0]):
        rows = [side.rows(at) for side in sides]
        both = [side.paired(r) for side, r in zip(sides, rows, strict=True)]
        found, counts, slopes = compared(both[0], both[1], kind)
        w = weights[:, None, at] * counts
        value += torch.where(w != 0, w * found, 0).sum()
        items += w.sum()
        if needs:
            _learn(sides, rows, both, slopes, w, at)
    factor = torch.where(items == 0, 0, 1 / torch.where(items == 0, 1, items))
    return value * factor, factor


def _frobenius(sides: Sides, weights: Tensor, kind: str, needs: str) -> tuple[Tensor, Tensor]:
    """The mean over samples and heads of ‖A_S - A_T‖/L, in two rounds: first all of the norms."""
    squares, total, length = (weights.new_zeros(()) for _ in range(3))
    for at in _blocks_of(sides[0]):
        both = [side.paired(side.rows(at)) for side in sides]
        found, counts, _ = compared(both[0], both[1], kind)
        w = weights[:, None, at] * counts
        squares = squares + torch.where(w != 0, w * found, 0).sum(-1)
        total, length = total + w.sum(-1), length + (w != 0).sum(-1)
    value, slope = norms(squares, total, length)
    if needs:
        for at in _blocks_of(sides[0]):
            rows = [side.rows(at) for side in sides]
            both = [side.paired(r) for side, r in zip(sides, rows, strict=True)]
            _, counts, slopes = compared(both[0], both[1], kind)
            w = weights[:, None, at] * counts * slope.unsqueeze(-1)
            _learn(sides, rows, both, slopes, w, at)
    return value, weights.new_ones(())


def norms(squares: Tensor, total: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of ‖A_S - A_T‖/L from sums over queries ``[B, heads]``, and its slopes by squares.

    ``squares`` are Σ_q w Σ_k (…)², ``total`` Σ_q w, ``length`` the number L of counted queries.
    The norm takes weights relative to their mean, and the mean weighs the sample: so a norm is that
    of the counted rows, whatever all of them weigh.
    """
    some = length > 0
    of_sample = torch.where(some, total / torch.where(some, length, 1), 0)
    square = torch.where(some, squares / torch.where(some, of_sample, 1), 0)
    zero = square == 0
    norm = torch.where(zero, 0, torch.where(zero, 1, square).sqrt())
    items = of_sample.sum()
    share = torch.where(items == 0, 0, 1 / torch.where(items == 0, 1, items))
    lengths = torch.where(some, length, 1)
    value = (of_sample * norm / lengths).sum() * share
    return value, torch.where(zero, 0, share / (2 * lengths * torch.where(zero, 1, norm)))


def _blocks_of(side: "_Side") -> list[slice]:
    batch, heads, queries, keys = side.shape
    size = max(1, BLOCK // max(1, batch * heads * keys), queries // BLOCKS)
    return [slice(start, start + size) for start in range(0, queries, size)]


def _learn(
    sides: Sides,
    rows: list[Rows],
    both: list[Rows],
    slopes: tuple[Tensor, Tensor],
    weights: Tensor,
    at: slice,
) -> None:
    w = weights.unsqueeze(-1)
    for side, r, pair, slope in zip(sides, rows, both, slopes, strict=True):
        if side.learns:
            slope = torch.where(w != 0, slope * w, 0)
            side.add(r, side.unpaired(r, pair, slope), at)


def compared(s: Rows, t: Rows, kind: str) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The value of each query, whether it counts, and the slopes by both x."""
    counts = s.kept.any(-1) & t.kept.any(-1)
    if kind == "kl":
        both = s.kept & t.kept
        a = torch.where(both, t.x.exp(), 0)
        ratio = torch.where(both, t.x, 0) - torch.where(both, s.x, 0)
        return (a * ratio).sum(-1), counts, (-a, a * (ratio + 1))
    if kind == "frobenius":
        difference = s.x - t.x
        return difference.square().sum(-1), counts, (2 * difference, -2 * difference)
    keys = s.kept & t.kept if kind == "scores" else s.kept | t.kept
    number = keys.sum(-1)
    counts = counts & (number > 0)
    difference = torch.where(keys, s.x - t.x, 0)
    each = difference / number.clamp(min=1).unsqueeze(-1)
    return (each * difference).sum(-1), counts, (2 * each, -2 * each)


class _Side:
    """One model: the rows of a block, and the gradients by its queries and keys.

    Queries of weight 0 and keys that nobody attends are 0 here, since they may hold anything.
    """

    def __init__(
        self, given: Operand, weights: Tensor, kind: str, heads: list[int], letters: str
    ) -> None:
        self.given, self.weights, self.kind, self.letters = given, weights, kind, letters
        self.key = given.key if given.is_map else _attended(wide(given.key), given.mask)
        batch, count, queries, last = given.query.shape
        self.shape = batch, count, queries, last if given.is_map else given.key.shape[2]
        everyone = heads == list(range(count))
        self.heads = None if everyone else torch.tensor(heads, device=given.query.device)
        self.mean = not heads
        self.scale = given.scale.to(self.key.dtype)
        self.mask = given.mask[(None,) * (4 - given.mask.ndim)]
        self.by_query, self.by_key, self.by_mask = list[Tensor | None]((None, None, None))

    def start(self, needs: str) -> None:
        """Make room for the gradients that ``needs`` names."""
        first, second, third = (letter in needs for letter in self.letters)
        self.by_query = _wide_zeros(self.given.query) if first else None
        self.by_key = _wide_zeros(self.given.key) if second else None
        self.by_mask = _wide_zeros(self.mask) if third else None

    @property
    def learns(self) -> bool:
        """Whether any gradient is wanted."""
        return any(g is not None for g in (self.by_query, self.by_key, self.by_mask))

    def gradients(self, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients times ``factor``, shaped like queries, keys and mask."""

        def made(gradient: Tensor | None, x: Tensor) -> Tensor:
            if gradient is None:
                return x.new_zeros(0)
            return gradient.mul_(factor).to(x.dtype).reshape(x.shape)

        query, key, mask = self.given[:3]
        return made(self.by_query, query), made(self.by_key, key), made(self.by_mask, mask)

    def queries(self, at: slice) -> Tensor:
        """The queries ``at``, or the rows of a given map."""
        return counted(wide(self.given.query[:, :, at]), self.weights[:, None, at])

    def rows(self, at: slice) -> Rows:
        """The rows of the queries ``at``: ``[B, H, rows, K]``."""
        query = self.queries(at)
        if self.given.is_map:
            a = torch.where(query.isnan(), 0, query)
            return Rows(_log(a) if self.kind == "kl" else a, kept_of(a, self.kind), a)
        scores = self._products(query, self.key.transpose(-1, -2)) * self.scale
        mask = self.mask if self.mask.shape[-2] == 1 else self.mask[..., at, :]
        kept = mask
        if mask.dtype != torch.bool:
            kept = mask > torch.finfo(mask.dtype).min / 2
            scores += torch.where(kept, mask, 0).to(scores.dtype)
        row = torch.arange(self.shape[2], device=query.device)[at]
        column = torch.arange(self.shape[3], device=query.device)
        kept = kept & ((column <= row[:, None]) | ~self.given.causal)
        if self.kind == "scores":
            kept = kept.expand(scores.shape)
            return Rows(torch.where(kept, scores, 0), kept, scores)
        empty = ~kept.any(-1, keepdim=True)
        scores = scores.masked_fill_(~kept, -torch.inf).masked_fill_(empty, 0)
        x = torch.log_softmax(scores, -1).masked_fill_(~kept, -torch.inf)
        a = x.exp()
        return Rows(x if self.kind == "kl" else a, kept.expand(x.shape), a)

    def _products(self, query: Tensor, key: Tensor) -> Tensor:
        """``query @ key``, where a head of keys serves several heads of queries."""
        batch, heads, rows, _ = query.shape
        few = key.shape[1]
        grouped = query.reshape(batch, few, heads // few * rows, query.shape[3])
        return (grouped @ key).reshape(batch, heads, rows, key.shape[3])

    def paired(self, rows: Rows) -> Rows:
        """The rows of the heads that are compared, or those of the mean over heads."""
        x, kept, a = rows
        if not self.mean:
            if self.heads is None:
                return rows
            return Rows(*(value.index_select(1, self.heads) for value in rows))
        if self.kind == "kl":
            x = torch.logsumexp(x, 1, keepdim=True) - math.log(x.shape[1])
        else:
            x = x.mean(1, keepdim=True)
        kept = (torch.all if self.kind == "scores" else torch.any)(kept, 1, keepdim=True)
        return Rows(x, kept, a)

    def unpaired(self, rows: Rows, pair: Rows, slope: Tensor) -> Tensor:
        """The slopes by the x of every head from those by what was compared."""
        if not self.mean:
            if self.heads is None:
                return slope
            return torch.zeros_like(rows.x).index_add_(1, self.heads, slope)
        count = rows.x.shape[1]
        if self.kind != "kl":
            return (slope / count).expand(rows.x.shape)
        share = torch.where(rows.kept, rows.x - pair.x - math.log(count), -torch.inf).exp()
        return slope * share

    def add(self, rows: Rows, slope: Tensor, at: slice) -> None:
        """Add the gradients of a block, given its slopes by x."""
        if self.given.is_map:
            assert self.by_query is not None
            if self.kind == "kl":
                slope = torch.where(rows.kept, slope / torch.where(rows.kept, rows.a, 1), 0)
            self.by_query[:, :, at] = slope
            return
        if self.kind in ("maps", "frobenius"):
            slope = slope * rows.a
        if self.kind == "scores":
            slope = torch.where(rows.kept, slope, 0)
        else:
            slope = slope - rows.a * slope.sum(-1, keepdim=True)
        slope = slope.to(self.key.dtype)
        if self.by_mask is not None:
            # Masks broadcast: their gradient is the sum over the axes that they do not have.
            into = self.by_mask if self.mask.shape[-2] == 1 else self.by_mask[..., at, :]
            into += slope.sum_to_size(into.shape)
        slope = slope * self.scale
        if self.by_query is not None:
            self.by_query[:, :, at] = self._products(slope, self.key)
        if self.by_key is not None:
            batch, few = self.key.shape[:2]
            by_score, query = (
                x.reshape(batch, few, -1, x.shape[3]) for x in (slope, self.queries(at))
            )
            self.by_key += by_score.transpose(-1, -2) @ query


def _attended(key: Tensor, mask: Tensor) -> Tensor:
    """The keys, with 0 for those that the mask shows to no query."""
    if mask.shape[-1:] != key.shape[2:3]:
        return key
    mask = mask[(None,) * (4 - mask.ndim)]
    if mask.dtype == torch.bool:
        shown = mask.any(-2).any(1)
    else:
        shown = mask.amax((1, 2)) > torch.finfo(mask.dtype).min / 2
    return torch.where(shown[:, None, :, None], key, 0)


def _wide_zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=wide(like.new_empty(())).dtype, device=like.device)


def kept_of(a: Tensor, kind: str) -> Tensor:
    """The keys of a given map that are not masked: where it is 0, unless it may be any matrix.

    For logarithms this is any number of which float32 holds no reciprocal.
    """
    if kind == "frobenius":
        return torch.ones_like(a, dtype=torch.bool)
    if kind == "scores":
        return a > torch.finfo(a.dtype).min / 2
    return a >= torch.finfo(a.dtype).tiny if kind == "kl" else a != 0


def _log(a: Tensor) -> Tensor:
    return torch.where(a > 0, torch.where(a > 0, a, 1).log(), -torch.inf)
