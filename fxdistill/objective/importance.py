"""Importance: the logit term weighs each prediction by a score, or keeps the highest ones only.

A prediction that does not count (its weight is 0) has no score and stays out. The weights that
result are those of the term's mean, Σ w·value / Σ w.
"""

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fxdistill.base.figures import shown
from fxdistill.base.nodes import one_node
from fxdistill.base.ranks import Ranks, over_ranks
from fxdistill.base.tensors import on_every_rank
from fxdistill.errors import OptionError, ShapeError, did_you_mean
from fxdistill.losses.fused.mix import divergences
from fxdistill.losses.fused.scores import READS
from fxdistill.losses.names import Loss, is_named, loss_name
from fxdistill.losses.scores import Asked, token_scores
from fxdistill.taps.markers import check

Score = str | Callable[[Tensor, Tensor], Tensor]
TIP = ("student_entropy", "divergence")  # what the score "tip" is made of
NAMES = (*READS, "tip")
_LIMITS = {"teacher_margin": 1.0, "gradient_norm": math.sqrt(2), "tip": 1.0}


@dataclass(frozen=True)
class Importance:
    """How important each prediction is in the logit term; for ``wrap(..., importance=...)``.

    With p_S and p_T at the objective's τ, over the vocabulary that is compared, a score is

    - ``"student_entropy"``, ``"teacher_entropy"``: -Σ p log p;
    - ``"teacher_margin"``: the difference of the teacher's two highest probabilities;
    - ``"divergence"``: the prediction's own logit loss;
    - ``"gradient_norm"``: ‖p_S - p_T‖₂;
    - ``"tip"``: 1 - (1 - h)(1 - d), with student entropy and divergence each scaled to [0, 1] over
      the counted predictions of the batch: informative are uncertain predictions, and certain ones
      that are wrong (Xu et al., 2026, arXiv 2604.14084);
    - a callable ``(student_logits, teacher_logits) -> scores``, from detached ``[B, L, V]`` to
      ``[B, L]``. It needs the logits, so they are made.

    Scores have no gradient, and named ones are formed without logits, by the fused head.

    Args:
        score: A name or a callable.
        keep: The share of counted predictions, ⌈keep·n⌉ of n, whose weight stays: those of the
            highest score, and of equal ones the earlier. All others have weight 0.
        threshold: Predictions whose score is not above it have weight 0; a setting, which
            ``distiller.set(threshold=...)`` and ``Schedule`` change. Given both, ``keep`` counts
            those above the threshold. Given neither, weights are multiplied by the score
            over its mean; a negative score counts as 0, and nothing counts where all are 0.
        features: Whether the positions that predict weigh as much in the terms of matches.

    Raises:
        OptionError: The score is unknown, or ``keep`` or ``threshold`` outside of its range.
    """

    score: Score
    keep: float | None = field(default=None, kw_only=True)
    threshold: float | None = field(default=None, kw_only=True)
    features: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.score, str) and self.score not in NAMES:
            raise OptionError(
                f"importance {self.score!r} is no score. Nearest: "
                f"{did_you_mean(self.score, NAMES)}; all of them: {', '.join(NAMES)}; or pass a "
                "callable (student_logits, teacher_logits) -> scores [B, L]."
            )
        if not isinstance(self.score, str) and not callable(self.score):
            raise OptionError(f"score={self.score!r} is neither the name of a score nor callable")
        if self.keep is not None and not (_is_number(self.keep) and 0 < self.keep <= 1):
            raise OptionError(f"keep={self.keep!r}: a share above 0 and up to 1, such as 0.5")
        if self.threshold is not None:
            self._check_threshold(self.threshold)

    def _check_threshold(self, threshold: Any) -> None:
        if not _is_number(threshold) or not math.isfinite(threshold):
            raise OptionError(f"threshold={threshold!r}: a finite number")
        if isinstance(self.score, str):
            limit = _LIMITS.get(self.score, math.inf)
            if not 0 <= threshold < limit:
                above = "" if limit == math.inf else f" and below {limit:.4g}"
                raise OptionError(
                    f"threshold={threshold!r}: {self.score} is never negative"
                    f"{'' if limit == math.inf else f', and at most {limit:.4g}'}, so a threshold "
                    f"is 0 or more{above}"
                )

    def at(self, threshold: Any) -> "Importance":
        """The same with another threshold; OptionError where it is outside of its range."""
        number = float(threshold) if isinstance(threshold, Tensor) else threshold
        return replace(self, threshold=number)

    @property
    def names(self) -> tuple[str, ...]:
        """The named scores that this one is made of; none for a callable."""
        if not isinstance(self.score, str):
            return ()
        return TIP if self.score == "tip" else (self.score,)

    @property
    def part(self) -> tuple[int, int] | None:
        """``keep`` as numerator and denominator, so that ⌈keep·n⌉ is exact."""
        if self.keep is None:
            return None
        part = Fraction(self.keep).limit_denominator(10**6)
        return (part or Fraction(1, 10**6)).as_integer_ratio()

    @property
    def drops(self) -> bool:
        """Whether some predictions may have weight 0."""
        return self.threshold is not None or self.part not in (None, (1, 1))

    @property
    def proportional(self) -> bool:
        """Whether weights are proportional to the score."""
        return self.threshold is None and self.keep is None

    @property
    def rule(self) -> str:
        """How weights follow from scores, as text: dynamo would make numbers symbolic.

        The threshold is not in it: it is a setting, which may change from step to step.
        """
        return repr((self.part, self.proportional))

    def __str__(self) -> str:
        given = {"keep": self.keep, "threshold": self.threshold}
        how = [f"{name} {value}" for name, value in given.items() if value is not None]
        how += ["features too"] if self.features else []
        return ", ".join([loss_name(self.score), *how])


def require_importance(importance: Any, logit_loss: Any) -> Importance | None:
    """Return ``importance``; OptionError if it is none, or if the logit loss cannot have it."""
    if importance is None:
        return None
    if not isinstance(importance, Importance):
        raise OptionError(
            f"importance={importance!r}: an fxdistill.Importance, such as "
            'Importance("student_entropy", keep=0.5)'
        )
    if logit_loss is None:
        raise OptionError("importance weighs the predictions of the logit loss, and there is none")
    if "divergence" in importance.names and not is_named(logit_loss):
        raise OptionError(
            f"importance {importance.score!r} needs the value of each prediction, and a logit_loss "
            "of your own returns their mean: use a named loss, or a callable score"
        )
    return importance


def scores_of(
    importance: Importance, loss: Loss, s: Tensor, t: Tensor, tau: Tensor, weights: Tensor
) -> Tensor:
    """The scores ``[..., n]`` of predictions, without gradient."""
    if isinstance(importance.score, str):
        mix = divergences(loss) if "divergence" in importance.names else ()
        asked = Asked(importance.names, mix).text
        return token_scores(s, t, asked=asked, temperature=tau, weights=weights)
    found = importance.score(on_every_rank(s.detach()), on_every_rank(t.detach()))
    require_scores(found, weights)
    return found.detach().unsqueeze(-1)


@check
def require_scores(scores: Tensor, weights: Tensor) -> None:
    """Raise ShapeError unless a callable has returned one score for each prediction."""
    if not isinstance(scores, Tensor) or scores.shape != weights.shape:
        what = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ShapeError(
            f"the score of importance= returned {what}, and there are {shown(weights.shape)} "
            "predictions: one number for each"
        )


def factors_of(
    importance: Importance,
    scores: Tensor,
    weights: Tensor,
    ranks: Ranks | None,
    threshold: Tensor | None,
) -> Tensor:
    """The factor of each prediction's weight, shaped like ``weights``; 0 where nothing counts.

    A mean score is over the samples of all ranks. ``keep`` and "tip" see this rank's own samples.
    """
    sums = None
    if importance.proportional and ranks is not None:
        sums = over_ranks(score_sums(scores, weights), ranks.groups)
    return factors(scores, weights, importance.rule, sums, threshold)


@one_node
def score_sums(scores: Tensor, weights: Tensor) -> Tensor:
    """``[2]``: the sum of the scores of the predictions that count, and the number of these."""
    counted = weights != 0
    return torch.stack([_score(scores, counted).clamp_min(0).sum(), counted.sum()])


@one_node
def factors(
    scores: Tensor,
    weights: Tensor,
    rule: str,
    sums: Tensor | None = None,
    threshold: Tensor | None = None,
) -> Tensor:
    """The factors of ``Importance.rule``; ``sums`` are ``score_sums`` of all ranks."""
    part, proportional = ast.literal_eval(rule)
    counted = weights != 0
    score = _score(scores, counted)
    if proportional:
        total, count = (score_sums(scores, weights) if sums is None else sums).unbind()
        mean = total / count.clamp_min(1)
        return torch.where(mean == 0, 0.0, score.clamp_min(0) / mean)
    kept = counted if threshold is None else counted & (score > threshold)
    if part is not None:
        kept = kept & (_order(score, kept) < _part_of(kept.sum(), part))
    return kept.to(score.dtype)


@one_node
def with_importance(weights: Tensor, found: Tensor) -> Tensor:
    """The weights of predictions, times their factors."""
    return weights * found


def kept_share(found: Tensor, weights: Tensor, ranks: Ranks | None) -> Tensor:
    """The share of counted predictions whose factor is not 0, over all ranks."""
    counts = torch.stack([(found != 0).sum(), (weights != 0).sum()]).float()
    if ranks is not None:
        counts = over_ranks(counts, ranks.groups)
    kept, counted = counts.unbind()
    return torch.where(counted == 0, torch.ones_like(kept), kept / counted.clamp_min(1))


def _score(scores: Tensor, counted: Tensor) -> Tensor:
    """One score for each prediction, in float32 at least; 0 where nothing counts."""
    scores = torch.where(counted.unsqueeze(-1), scores, 0)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if scores.shape[-1] == 1:
        return scores.squeeze(-1)
    h, d = (_scaled(x, counted) for x in scores.unbind(-1))
    return torch.where(counted, 1 - (1 - h) * (1 - d), 0.0)


def _scaled(x: Tensor, counted: Tensor) -> Tensor:
    """``x``, scaled to [0, 1] over what counts; 0 if all of that is equal."""
    least = torch.where(counted, x, torch.inf).amin()
    span = torch.where(counted, x, -torch.inf).amax() - least
    return torch.where(span > 0, (x - least) / span, 0.0)


def _order(score: Tensor, kept: Tensor) -> Tensor:
    """The rank of each prediction by its score; of equal scores the earlier comes first."""
    flat = torch.where(kept, score, -torch.inf).flatten()
    by_score = flat.sort(descending=True, stable=True).indices
    order = torch.empty_like(by_score)
    places = torch.arange(len(flat), device=flat.device)
    return order.scatter(0, by_score, places).reshape(score.shape)


def _part_of(count: Any, part: tuple[int, int]) -> Any:
    """⌈count · numerator / denominator⌉."""
    return (count * part[0] + part[1] - 1) // part[1]


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
