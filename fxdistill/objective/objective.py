"""The objective: which losses apply to which values of which models, with which weights.

L = λ_logit · L_logit + λ · (1/N) Σ weight_i · loss_i + λ_label · L_label

One object computes it in eager, regional and captured runs: the captured graph is a trace of the
same lines. ``heads.read_total`` reads that trace backwards, so this is the one place that defines
the form of the total: the sum of a stack of ``weight · loss``, where a loss may carry a factor.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxdistill.base.attention import each
from fxdistill.base.ranks import Ranks, over_ranks, total_over_ranks
from fxdistill.base.tensors import on_every_rank
from fxdistill.losses.names import Loss, aligns_labels, is_named
from fxdistill.losses.reduce import IGNORE
from fxdistill.models.conventions import Task
from fxdistill.models.tap import Tap, Tower
from fxdistill.objective.beside import Beside, numbered
from fxdistill.objective.denominators import denominator, items_elsewhere, rescaled
from fxdistill.objective.feature_terms import Lookup, Step, feature_terms
from fxdistill.objective.importance import (
    Importance,
    factors_of,
    kept_share,
    scores_of,
    with_importance,
)
from fxdistill.objective.term import LOGITS, PAIRS, LabelTerm, LogitTerm, Term
from fxdistill.objective.tokens import Batch, align_labels, prediction_weights
from fxdistill.objective.values import ordinary
from fxdistill.objective.vocabulary import (
    require_numbers_of_classes,
    require_task,
    require_vocabulary_last,
    shared_vocabulary,
)


class Losses(NamedTuple):
    """The total, with gradients, and the unweighted terms by name, without gradients.

    ``metrics`` says what else the step has found: "kept", where importance drops predictions
    (elsewhere the output says that all are kept).
    """

    total: Tensor
    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]


class StepWeights(NamedTuple):
    """The settings of a step as 0-d tensors; ``matches`` has one weight per match, in order."""

    logits: Tensor
    features: Tensor
    labels: Tensor
    temperature: Tensor
    matches: tuple[Tensor, ...]

    @classmethod
    def of(cls, settings: "Tensor | StepWeights") -> "StepWeights":
        """Split the vector that enters the graph: ``GLOBAL_SETTINGS`` in order, then matches."""
        if isinstance(settings, StepWeights):  # of one who differentiates by each weight
            return settings
        logits, features, labels, temperature = settings[:4].unbind()
        return cls(logits, features, labels, temperature, settings[4:].unbind())


class Predictions(NamedTuple):
    """The logits of one model that learns, and the weight of each prediction.

    ``items`` is the denominator, where it is not the sum of the weights. ``counts`` is what a given
    number of items counts: the predictions, or the labels where these have a grid of their own.
    """

    logits: Tensor
    task: Task | None
    weights: Tensor
    items: Tensor | None
    counts: Tensor

    def by(self, factors: Tensor, given: Tensor | None, ranks: Ranks | None) -> "Predictions":
        """The predictions with their importance; a ``given`` number of items stays what it is."""
        weights = with_importance(self.weights, factors)
        items = self.items if given is not None else denominator(None, weights, 0, ranks, factors)
        return self._replace(weights=weights, items=items)


class Found(NamedTuple):
    """A term on logits, its weight in the total, and the importance of its predictions."""

    name: str
    weight: Tensor
    loss: Tensor
    factors: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """All terms of a distiller. A kind of loss without terms is off."""

    features: tuple[Term, ...] = ()
    logits: tuple[LogitTerm, ...] = ()
    labels: tuple[LabelTerm, ...] = ()
    task: Task | None = None
    vocab_size: int | None = None
    # Models whose values are constants; the distiller sets this.
    frozen: frozenset[Tower] = frozenset()
    ranks: Ranks | None = None  # the ranks, where they hold different samples
    own_losses: bool = True  # the library's logit and label losses: it knows the shapes they take
    importance: Importance | None = None  # of the predictions, in the terms of logits
    returns: Tower | None = None  # the model whose logits the step returns besides its losses

    @property
    def weighed(self) -> tuple[str, ...]:
        """The names of the feature terms: each has a weight of its own, in this order."""
        alone = tuple(term.name for term in self.features if not term.in_pairs)
        return alone if len(alone) == len(self.features) else (*alone, PAIRS)

    @property
    def compared(self) -> frozenset[Tower]:
        """The models that a term reads as its teacher."""
        return frozenset((*(t.of[1] for t in self.features), *(t.teacher for t in self.logits)))

    @property
    def towers(self) -> frozenset[Tower]:
        """The models that any term reads."""
        learning = (*(t.of[0] for t in self.features), *self._predicting)
        return self.compared.union(learning)

    @property
    def reads(self) -> tuple[tuple[Tower, Tap], ...]:
        """Every value that the terms or the caller need, each once."""
        found = [tap for term in self.features for tap in term.taps]
        found += [(tower, LOGITS) for tower in self.with_logits]
        return tuple(dict.fromkeys(found))

    @property
    def with_logits(self) -> tuple[Tower, ...]:
        """The models whose logits are read."""
        returned = () if self.returns is None else (self.returns,)
        teachers = (term.teacher for term in self.logits)
        return tuple(dict.fromkeys((*self._predicting, *teachers, *returned)))

    @property
    def can_fuse(self) -> bool:
        """Whether the fused head has these losses, and every teacher of logits is frozen."""
        if any(aligns_labels(term.loss) for term in self.labels):
            return False
        if self.importance is not None and not self.importance.names:
            return False
        return self.own_losses and all(term.teacher in self.frozen for term in self.logits)

    @property
    def unchanging(self) -> bool:
        """Whether all losses are the library's own: a callable of the user's may have state."""
        losses = [term.loss for term in self.features]
        losses += [*(t.loss for t in self.logits), *(t.loss for t in self.labels)]
        named = self.importance is None or bool(self.importance.names)
        return named and all(map(is_named, losses))

    @property
    def learns_from_features_alone(self) -> bool:
        """Whether only matches can train anything: teachers frozen, nothing beside them."""
        plain = all(t.projection is None and t.module is None for t in self.features)
        return plain and not self.logits and not self.labels and self.compared <= self.frozen

    @property
    def _predicting(self) -> tuple[Tower, ...]:
        """The models that learn from their logits, in the order of the terms."""
        of_logits, of_labels = (t.student for t in self.logits), (t.student for t in self.labels)
        return tuple(dict.fromkeys((*of_logits, *of_labels)))

    def on(self, ranks: Ranks | None) -> "Objective":
        """The objective of a call whose samples lie on ``ranks``; ranks set before are kept."""
        return self if ranks is None or self.ranks is not None else replace(self, ranks=ranks)

    def with_modules(self, losses: nn.ModuleList) -> "Objective":
        """The objective whose terms know their losses among ``losses``, which gains the modules."""
        return replace(
            self,
            features=numbered(self.features, losses),
            logits=numbered(self.logits, losses),
            labels=numbered(self.labels, losses),
        )

    def without_labels(self) -> "Objective":
        """The objective of a call without labels."""
        return replace(self, labels=())

    def returning(self, tower: Tower) -> "Objective":
        """The objective of a step that also returns the logits of ``tower``, if terms read them."""
        return replace(self, returns=tower) if tower in self._predicting else self

    def taps_of(self, tower: Tower) -> list[Tap]:
        """The values of one model that matches read."""
        return [tap for term in self.features for name, tap in term.taps if name == tower]

    def __call__(
        self,
        lookup: Lookup,
        batch: Batch,
        settings: Tensor,
        beside: Beside,
        anchor: Tensor,
    ) -> Losses:
        """Compute the total and its terms.

        ``lookup(tower, tap)`` returns a tapped value; ``StepWeights.of`` unpacks ``settings``.
        ``anchor`` is a trainable value: a total without terms is 0 · anchor, so that ``backward``
        runs and gives zero gradients.
        """
        lookup = with_constants(lookup, self.frozen)
        weights = StepWeights.of(settings)
        parts: list[Tensor] = []
        terms: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        task, counted = self.task, None
        weighed = batch  # with the importance of positions, where features have it too
        for tower in self._predicting:
            made = self._predictions(tower, lookup, batch)
            task, counted = task or made.task, made.counts if counted is None else counted
            found = self._of_logits(tower, made, lookup, batch, weights, beside)
            for name, weight, loss, factors in found:
                parts.append(weight * loss)
                terms[name] = loss.detach()
                if factors is not None and self.importance is not None and weighed is batch:
                    if self.importance.drops:
                        metrics["kept"] = kept_share(factors, made.weights, self.ranks)
                    weighed = batch.weighed(factors) if self.importance.features else batch
        if self.features:
            step = Step(weighed, task, beside, self.ranks, counted)
            named = feature_terms(self.features, lookup, step)
            weighted = [w * loss for w, loss in zip(weights.matches, named.values(), strict=True)]
            mean = torch.stack(weighted).sum() / len(weighted)
            parts.append(weights.features * mean)
            terms["features"] = mean.detach()
            terms.update({name: loss.detach() for name, loss in named.items()})
        total = torch.stack(parts).sum() if parts else anchor.reshape(-1)[:1].sum() * 0.0
        if self.ranks is not None:
            total, terms = together(total, terms, self.ranks)
        return Losses(total, terms, metrics)

    def _predictions(self, tower: Tower, lookup: Lookup, batch: Batch) -> Predictions:
        """The logits of ``tower``, and the weights of its predictions."""
        logits = lookup(tower, LOGITS)
        task = self.task or ("classification" if logits.ndim == 2 else None)
        if self.own_losses:
            require_vocabulary_last(logits, task)
            require_numbers_of_classes(batch.labels)
        require_task(task, logits, batch)
        counts = None
        if (labels := batch.labels) is not None and self._labels_apart(labels, logits):
            counts, batch = (labels != IGNORE).float(), batch._replace(labels=None)
        weights = prediction_weights(batch, task, logits)
        if counts is None or batch.num_items is None:
            items = denominator(batch.num_items, weights, 0, self.ranks, logits)
        else:
            items = items_elsewhere(batch.num_items, weights, counts, self.ranks)
        return Predictions(logits, task, weights, items, weights if counts is None else counts)

    def _of_logits(
        self,
        tower: Tower,
        made: Predictions,
        lookup: Lookup,
        batch: Batch,
        weights: StepWeights,
        beside: Beside,
    ) -> list[Found]:
        """Each term on the logits of ``tower``."""
        found = []
        for term in self.logits:
            if term.student == tower:
                given = (lookup, weights.temperature, batch.num_items)
                weight = of_share(weights.logits, term.share)
                loss_of = beside.loss_of(term, self.ranks)
                value, factors = self._logit_term(loss_of, term, made, *given)
                found.append(Found(term.name, weight, value, factors))
        for label in self.labels:
            if label.student == tower:
                loss_of = beside.loss_of(label, self.ranks)
                loss = self._label_term(loss_of, label, made, batch.labels, batch.num_items)
                found.append(Found(label.name, of_share(weights.labels, label.share), loss))
        return found

    def _logit_term(
        self,
        loss_of: Loss,
        term: LogitTerm,
        made: Predictions,
        lookup: Lookup,
        temperature: Tensor,
        num_items: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The value of a term, and the importance of its predictions."""
        s, t = shared_vocabulary(made.logits, lookup(term.teacher, LOGITS), self.vocab_size)
        if not self.own_losses:
            s, t = on_every_rank(s), on_every_rank(t)
        factors = None
        if (importance := self.importance) is not None:
            scores = scores_of(importance, term.loss, s, t, temperature, made.weights)
            factors = factors_of(importance, scores, made.weights, self.ranks)
            made = made.by(factors, num_items, self.ranks)
        loss = loss_of(s, t, temperature=temperature, weights=made.weights)
        return rescaled(ordinary(loss, term.name), made.weights, 0, made.items), factors

    def _label_term(
        self,
        loss_of: Loss,
        term: LabelTerm,
        made: Predictions,
        labels: Tensor | None,
        num_items: Tensor | None,
    ) -> Tensor:
        assert labels is not None
        assert made.task is not None
        apart = self._labels_apart(labels, made.logits)
        aligned = labels if apart else align_labels(labels, made.task)
        logits = made.logits if self.own_losses else on_every_rank(made.logits)
        loss = ordinary(loss_of(logits, aligned, weights=made.weights), term.name)
        if not apart:
            return rescaled(loss, made.weights, 0, made.items)
        items = denominator(num_items, made.counts, 0, self.ranks, loss)
        return rescaled(loss, made.counts, 0, items)

    def _labels_apart(self, labels: Tensor, logits: Tensor) -> bool:
        """Whether labels have a grid of their own, which a loss of the user's, or ctc, aligns."""
        if any(aligns_labels(term.loss) for term in self.labels):
            return True
        own = not all(is_named(term.loss) for term in self.labels)
        return own and labels.shape != logits.shape[:-1]


def of_share(weight: Tensor, share: float) -> Tensor:
    """A term's share of a global weight; a share of 1 adds no node to the graph."""
    return weight if share == 1.0 else weight * share


def together(
    total: Tensor, terms: dict[str, Tensor], ranks: Ranks
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum the total and the terms over ranks."""
    summed = {name: over_ranks(value, ranks.groups) for name, value in terms.items()}
    return total_over_ranks(total, ranks.groups, ranks.scale), summed


def with_constants(lookup: Lookup, frozen: frozenset[Tower]) -> Lookup:
    """Detach the values of frozen models, which may switch gradients on inside; each value once."""
    found: dict[tuple[Tower, Tap], Any] = {}

    def detached(tower: Tower, tap: Tap) -> Any:
        if tower not in frozen:
            return lookup(tower, tap)
        if (tower, tap) not in found:
            found[tower, tap] = each(torch.Tensor.detach, lookup(tower, tap))
        return found[tower, tap]

    return detached
