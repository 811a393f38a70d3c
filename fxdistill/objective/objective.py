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
from fxdistill.losses.names import aligns_labels, is_named
from fxdistill.models.conventions import Task
from fxdistill.models.tap import Tap, Tower
from fxdistill.objective.beside import Beside, numbered, numbered_head
from fxdistill.objective.feature_terms import Lookup, Step, feature_terms
from fxdistill.objective.importance import Importance, kept_share
from fxdistill.objective.logit_terms import (
    Found,
    LogitStep,
    Predictions,
    Rules,
    head_terms,
    label_term,
    logit_term,
    predictions,
)
from fxdistill.objective.step_weights import Names, StepWeights
from fxdistill.objective.term import LOGITS, PAIRS, HeadTerm, LabelTerm, LogitTerm, Term
from fxdistill.objective.tokens import Batch


class Losses(NamedTuple):
    """The total, with gradients, and the unweighted terms by name, without gradients.

    ``metrics`` says what else the step has found: "kept", where importance drops predictions (of
    several students the mean; elsewhere the output says that all are kept).
    """

    total: Tensor
    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]


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
    heads: tuple[HeadTerm, ...] = ()  # further logits of a student
    ranks: Ranks | None = None  # the ranks, where they hold different samples
    own_losses: bool = True  # the library's logit and label losses: it knows the shapes they take
    importance: Importance | None = None  # of the predictions, in the terms of logits
    labels_apart: bool = False  # the labels' grid is known to be another than that of the logits
    returns: Tower | None = None  # the model whose logits the step returns besides its losses
    returns_if_any: bool = False  # no term reads these, and the model may have none

    @property
    def weighed(self) -> tuple[str, ...]:
        """The names of the feature terms: each has a weight of its own, in this order."""
        alone = tuple(term.name for term in self.features if not term.in_pairs)
        return alone if len(alone) == len(self.features) else (*alone, PAIRS)

    @property
    def names(self) -> Names:
        """The names of the settings behind the global ones."""
        of_heads = tuple(term.name for head in self.heads for term in head.terms)
        mixed = (*self.logits, *(h.logits for h in self.heads if h.logits is not None))
        teachers = next((t.teachers for t in mixed if t.weighs), ())
        return Names(self.weighed, of_heads, teachers, self._with_threshold)

    @property
    def _with_threshold(self) -> Importance | None:
        found = self.importance
        return None if found is None or found.threshold is None else found

    @property
    def compared(self) -> frozenset[Tower]:
        """The models that a term reads as its teacher."""
        of_logits = (tower for term in self.logits for tower in term.teachers)
        of_heads = (tower for head in self.heads for tower, _ in head.targets)
        return frozenset((*(t.of[1] for t in self.features), *of_logits, *of_heads))

    @property
    def towers(self) -> frozenset[Tower]:
        """The models that any term reads."""
        learning = (*(t.of[0] for t in self.features), *self._predicting)
        return self.compared.union(learning, (head.student for head in self.heads))

    @property
    def reads(self) -> tuple[tuple[Tower, Tap], ...]:
        """Every value that the terms or the caller need, each once."""
        found = [tap for term in self.features for tap in term.taps]
        found += [end for end in self.of_heads if end[1] != LOGITS]
        found += [(tower, LOGITS) for tower in self.with_logits]
        return tuple(dict.fromkeys(found))

    @property
    def with_logits(self) -> tuple[Tower, ...]:
        """The models whose logits are read."""
        returned = () if self.returns is None else (self.returns,)
        teachers = (tower for term in self.logits for tower in term.teachers)
        of_heads = (tower for tower, tap in self.of_heads if tap == LOGITS)
        return tuple(dict.fromkeys((*self._predicting, *teachers, *of_heads, *returned)))

    @property
    def needing_logits(self) -> tuple[Tower, ...]:
        """The models that must have logits."""
        if not self.returns_if_any:
            return self.with_logits
        return tuple(tower for tower in self.with_logits if tower != self.returns)

    @property
    def of_heads(self) -> tuple[tuple[Tower, Tap], ...]:
        """The values that heads read."""
        return tuple(
            end for head in self.heads for end in ((head.student, head.tap), *head.targets)
        )

    @property
    def can_fuse(self) -> bool:
        """Whether the fused head has these losses, and nothing learns from being a target."""
        if any(aligns_labels(term.loss) for term in self.labels):
            return False
        if self.importance is not None and not self.importance.names:
            return False
        return self.own_losses and all(self._is_constant(term) for term in self.logits)

    def _is_constant(self, term: LogitTerm) -> bool:
        """Whether a term's target gets no gradient, as the fused head has it."""
        if self.frozen.issuperset(term.teachers):
            return True
        return term.constant and self.importance is None

    @property
    def unchanging(self) -> bool:
        """Whether all losses are the library's own: a callable of the user's may have state."""
        losses = [term.loss for term in self.features]
        losses += [*(t.loss for t in self.logits), *(t.loss for t in self.labels)]
        losses += [term.loss for head in self.heads for term in head.terms]
        named = self.importance is None or bool(self.importance.names)
        return named and all(map(is_named, losses))

    @property
    def learns_from_features_alone(self) -> bool:
        """Whether only matches can train anything: teachers frozen, nothing beside them."""
        plain = all(t.projection is None and t.module is None for t in self.features)
        others = self.logits or self.labels or self.heads
        return plain and not others and self.compared <= self.frozen

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
            heads=tuple(numbered_head(head, losses) for head in self.heads),
        )

    def without_labels(self) -> "Objective":
        """The objective of a call without labels; each head keeps its setting."""
        return replace(self, labels=())

    def returning(self, tower: Tower) -> "Objective":
        """The objective of a step that also returns the logits of ``tower``.

        Where no term reads them, it returns those that there are.
        """
        if self.returns is not None:
            return self
        return replace(self, returns=tower, returns_if_any=tower not in self.with_logits)

    def taps_of(self, tower: Tower) -> list[Tap]:
        """The values of one model that matches read."""
        found = [tap for term in self.features for name, tap in term.taps if name == tower]
        return found + [tap for name, tap in self.of_heads if name == tower and tap != LOGITS]

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
        weights = StepWeights.of(settings, self.names)
        parts: list[Tensor] = []
        terms: dict[str, Tensor] = {}
        kept: list[Tensor] = []
        step = LogitStep(lookup, batch, weights, beside, self._rules)
        first: Predictions | None = None
        weighed: dict[Tower, Batch] = {}  # with importance, of models whose features have it too
        for tower in self._predicting:
            made = predictions(lookup(tower, LOGITS), step)
            first = made if first is None else first
            for name, weight, loss, factors in self._of_tower(tower, made, step):
                parts.append(weight * loss)
                terms[name] = loss.detach()
                if factors is None or self.importance is None or tower in weighed:
                    continue
                if self.importance.drops:
                    kept.append(kept_share(factors, made.weights, self.ranks))
                weighed[tower] = batch.weighed(factors) if self.importance.features else batch
        for head in self.heads:
            own = None if first is None else first.logits
            of_head, found = head_terms(head, step, own)
            first = of_head if first is None else first
            parts += [weight * loss for _, weight, loss, _ in found]
            terms.update({name: loss.detach() for name, _, loss, _ in found})
        task = self.task if first is None else first.task
        counted = None if first is None else first.counts
        if self.features:
            of_features = Step(batch, task, beside, self.ranks, counted, weighed)
            named = feature_terms(self.features, lookup, of_features)
            weighted = [w * loss for w, loss in zip(weights.matches, named.values(), strict=True)]
            mean = torch.stack(weighted).sum() / len(weighted)
            parts.append(weights.features * mean)
            terms["features"] = mean.detach()
            terms.update({name: loss.detach() for name, loss in named.items()})
        total = torch.stack(parts).sum() if parts else anchor.reshape(-1)[:1].sum() * 0.0
        if self.ranks is not None:
            total, terms = together(total, terms, self.ranks)
        return Losses(total, terms, {"kept": _mean(kept)} if kept else {})

    @property
    def _rules(self) -> Rules:
        own_labels = not all(is_named(term.loss) for term in self.labels)
        apart = self.labels_apart or any(aligns_labels(term.loss) for term in self.labels)
        given = (self.task, self.vocab_size, self.own_losses, apart, own_labels)
        return Rules(*given, self.importance, self.ranks)

    def _of_tower(self, tower: Tower, made: Predictions, step: LogitStep) -> list[Found]:
        """Each term on the logits of ``tower``."""
        divergences = [term for term in self.logits if term.student == tower]
        on_labels = [term for term in self.labels if term.student == tower]
        found = [logit_term(term, made, step) for term in divergences]
        return found + [label_term(term, made, step) for term in on_labels]


def _mean(shares: list[Tensor]) -> Tensor:
    """The mean over students of the share of predictions that is kept."""
    return shares[0] if len(shares) == 1 else torch.stack(shares).mean()


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
