"""Divergences as sums over the columns of a chunk, with their gradients written out.

The formulas are those of ``losses/logits.py``, so that value and gradient come from one reading of
the chunk. Tests compare them with autograd of the plain functions.

With z the student's logits, s = z/τ, q = softmax(s), t and p the teacher's, σ the sigmoid and C the
number of columns, the value of a token is τ²v (``total_variation``: v):

======================  =============================  ==================================
divergence              v                              ∂v/∂s
======================  =============================  ==================================
forward_kl              Σ p (log p - log q)            q - p
soft_cross_entropy      -Σ p log q                     q - p
reverse_kl              Σ q (log q - log p)            q (log q - log p - v)
jsd, m = βp + (1-β)q    β KL(p‖m) + (1-β) KL(q‖m)      (1-β) q (log q/m - Σ q log q/m)
total_variation         ½ Σ abs(q - p)                 ½ q (sign(q-p) - Σ q sign(q-p))
mse_logits              Σ (s - t)² / C                 2 (s - t) / C
sigmoid_kl              Σ KL(σ(t)‖σ(s)) / C            (σ(s) - σ(t)) / C
======================  =============================  ==================================
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

FLOOR = -1e4
Divergence = tuple[str, float, float]  # name, weight, β
Sums = tuple[Tensor, Tensor]  # for each token [c]: the value, and the sum that the slope needs
Pair = tuple[Tensor, Tensor]  # of student and teacher, [c, V] each


# ---- for each divergence: sums over the columns, and the slope that follows from them


def _forward_kl(log_q: Tensor, log_p: Tensor, beta: float) -> Sums:
    p = log_p.exp()
    value = (p * torch.where(p > 0, log_p - log_q, 0.0)).sum(-1)
    return value, value


def _soft_cross_entropy(log_q: Tensor, log_p: Tensor, beta: float) -> Sums:
    p = log_p.exp()
    value = -torch.where(p > 0, p * log_q, 0.0).sum(-1)
    return value, value


def _q_minus_p(log_q: Tensor, log_p: Tensor, beta: float, inner: Tensor) -> Tensor:
    return log_q.exp() - log_p.exp()


def _reverse_kl(log_q: Tensor, log_p: Tensor, beta: float) -> Sums:
    q = log_q.exp()
    value = (q * torch.where(q > 0, log_q - log_p, 0.0)).sum(-1)
    return value, value


def _reverse_kl_slope(log_q: Tensor, log_p: Tensor, beta: float, inner: Tensor) -> Tensor:
    q = log_q.exp()
    return torch.where(q > 0, q * (log_q - log_p - inner[:, None]), 0.0)


def _mixture(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    log_q, log_p = log_q.clamp_min(FLOOR), log_p.clamp_min(FLOOR)
    return log_q, log_p, torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))


def _jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Sums:
    log_q, log_p, log_m = _mixture(log_q, log_p, beta)
    of_q = (log_q.exp() * (log_q - log_m)).sum(-1)
    return beta * (log_p.exp() * (log_p - log_m)).sum(-1) + (1 - beta) * of_q, of_q


def _jsd_slope(log_q: Tensor, log_p: Tensor, beta: float, inner: Tensor) -> Tensor:
    log_q, log_p, log_m = _mixture(log_q, log_p, beta)
    return (1 - beta) * log_q.exp() * (log_q - log_m - inner[:, None])


def _total_variation(log_q: Tensor, log_p: Tensor, beta: float) -> Sums:
    q = log_q.exp()
    gap = q - log_p.exp()
    return gap.abs().sum(-1) / 2, (q * gap.sign()).sum(-1)


def _total_variation_slope(log_q: Tensor, log_p: Tensor, beta: float, inner: Tensor) -> Tensor:
    q = log_q.exp()
    return q * ((q - log_p.exp()).sign() - inner[:, None]) / 2


def _gap(s: Tensor, t: Tensor) -> Tensor:
    """The difference of logits; 0 where a model rules the entry out."""
    return torch.where((s == -torch.inf) | (t == -torch.inf), 0.0, s - t)


def _mse_logits(s: Tensor, t: Tensor, beta: float) -> Sums:
    value = _gap(s, t).square().sum(-1)
    return value, value


def _mse_logits_slope(s: Tensor, t: Tensor, beta: float, inner: Tensor) -> Tensor:
    return 2 * _gap(s, t)


def _of_outcome(s: Tensor, t: Tensor) -> Tensor:
    p = t.sigmoid()
    return p * torch.where(p > 0, logsigmoid(t) - logsigmoid(s), 0.0)


def _sigmoid_kl(s: Tensor, t: Tensor, beta: float) -> Sums:
    value = (_of_outcome(s, t) + _of_outcome(-s, -t)).sum(-1)
    return value, value


def _sigmoid_kl_slope(s: Tensor, t: Tensor, beta: float, inner: Tensor) -> Tensor:
    return s.sigmoid() - t.sigmoid()


@dataclass(frozen=True)
class Formula:
    """A divergence: for each token its sums over the columns, and its slope ∂v/∂s.

    ``sums`` returns the value v and the sum that ``slope`` needs. Sums over parts of the columns
    add up to those over all columns: the sharded form relies on this. Both take log-probabilities,
    or logits over τ (``of_logits``). ``averaged`` divides by the number of columns, and
    ``squared=False`` says that the value has no factor τ².
    """

    sums: Callable[[Tensor, Tensor, float], Sums]
    slope: Callable[[Tensor, Tensor, float, Tensor], Tensor]
    of_logits: bool = False
    averaged: bool = False
    squared: bool = True


DIVERGENCES = {
    "forward_kl": Formula(_forward_kl, _q_minus_p),
    "soft_cross_entropy": Formula(_soft_cross_entropy, _q_minus_p),
    "reverse_kl": Formula(_reverse_kl, _reverse_kl_slope),
    "jsd": Formula(_jsd, _jsd_slope),
    "total_variation": Formula(_total_variation, _total_variation_slope, squared=False),
    "mse_logits": Formula(_mse_logits, _mse_logits_slope, of_logits=True, averaged=True),
    "sigmoid_kl": Formula(_sigmoid_kl, _sigmoid_kl_slope, of_logits=True, averaged=True),
}


def formula_of(name: str, beta: float) -> Formula:
    """The formula of a divergence; JSD at β = 0 and 1 is forward and reverse KL."""
    if name == "jsd" and beta in (0, 1):
        name = "reverse_kl" if beta else "forward_kl"
    return DIVERGENCES[name]


class Compared(NamedTuple):
    """What formulas read: both models' log-probabilities, and their logits over τ.

    Either is ``None`` where no formula reads it. A stored teacher has no logits.
    """

    logs: Pair | None
    logits: Pair | None = None

    def of(self, formula: Formula) -> Pair:
        """The values that ``formula`` takes."""
        found = self.logits if formula.of_logits else self.logs
        assert found is not None
        return found


class Mix(NamedTuple):
    """Σ weight · v of several divergences over ``columns``, at the temperature ``tau``."""

    divergences: tuple[Divergence, ...]
    columns: int
    tau: Tensor

    @property
    def reads_logs(self) -> bool:
        """Whether a formula reads log-probabilities."""
        return any(not formula_of(name, beta).of_logits for name, _, beta in self.divergences)

    def sums(self, x: Compared) -> list[Tensor]:
        """The value of the mix, then for each divergence the sum that its slope needs."""
        value: Tensor | None = None
        found = []
        for name, weight, beta in self.divergences:
            formula = formula_of(name, beta)
            v, inner = formula.sums(*x.of(formula), beta)
            each = self._factor(formula, weight) * v
            value = each if value is None else value + each
            found.append(inner)
        assert value is not None
        return [value, *found]

    def slope(self, x: Compared, inner: Sequence[Tensor]) -> Tensor:
        """The slope of the mix, added up one by one: a stack of all slopes would stay in memory."""
        slope: Tensor | None = None
        for (name, weight, beta), total in zip(self.divergences, inner, strict=True):
            formula = formula_of(name, beta)
            each = formula.slope(*x.of(formula), beta, total)
            each = self._factor(formula, weight) * each
            slope = each if slope is None else slope + each
        assert slope is not None
        return slope

    def _factor(self, formula: Formula, weight: float) -> Tensor | float:
        each = weight / self.columns if formula.averaged else weight
        return each if formula.squared else each / self.tau.square()
