"""Scores of a prediction as sums over the columns; ``scores.py`` has the table."""

import torch
from torch import Tensor

from fxdistill.losses.fused.formulas import Compared


def entropy(log_p: Tensor) -> Tensor:
    """-Σ p log p over these columns."""
    return -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)


def squared_distance(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Σ (q - p)² over these columns."""
    return (log_q.exp() - log_p.exp()).square().sum(-1)


def largest_two(x: Tensor) -> list[Tensor]:
    """The two largest entries of each row."""
    most, at = x.max(-1)
    others = torch.where(torch.arange(x.shape[-1], device=x.device) == at[:, None], -torch.inf, x)
    return [most, others.amax(-1)]


def score_of(name: str, x: Compared, value: Tensor, tau: Tensor) -> Tensor:
    """A score from all columns, 0 at least; ``value`` is the divergence's, before the factor τ²."""
    assert x.logs is not None
    log_q, log_p = x.logs
    if name == "divergence":
        score = tau.square() * value
    elif name == "gradient_norm":
        score = squared_distance(log_q, log_p).sqrt()
    elif name == "teacher_margin":
        first, second = largest_two(log_p)
        score = first.exp() - second.exp()
    else:
        score = entropy(log_q if name == "student_entropy" else log_p)
    return score.clamp_min(0)
