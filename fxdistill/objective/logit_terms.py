"""The terms on logits: of models and of further heads, against teachers and against labels."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxdistill.base.figures import shown
from fxdistill.base.ranks import Ranks
from fxdistill.base.tensors import on_every_rank
from fxdistill.errors import ShapeError
from fxdistill.losses.logits import mse_logits, sigmoid_kl
from fxdistill.losses.mixture import Pooled, mean_of_teachers
from fxdistill.losses.names import Loss, plain_loss
from fxdistill.losses.reduce import IGNORE
from fxdistill.models.conventions import Task
from fxdistill.objective.beside import Beside
from fxdistill.objective.denominators import (
    counted_labels,
    denominator,
    items_elsewhere,
    rescaled,
)
from fxdistill.objective.feature_terms import Lookup
from fxdistill.objective.importance import Importance, factors_of, scores_of, with_importance
from fxdistill.objective.pooled_head import made_logits
from fxdistill.objective.step_weights import StepWeights
from fxdistill.objective.term import LOGITS, HeadTerm, LabelTerm, LogitTerm
from fxdistill.objective.tokens import Batch, align_labels, prediction_weights
from fxdistill.objective.values import ordinary
from fxdistill.objective.vocabulary import (
    differ_by_padding,
    named_model,
    require_numbers_of_classes,
    require_one_grid,
    require_task,
    require_vocabulary_last,
    shared_vocabulary,
)
from fxdistill.taps.markers import check


class Rules(NamedTuple):
    """What holds for every prediction of a distiller.

    ``apart`` says that a label loss takes labels of any grid, ``own_labels`` that it is the
    user's, ``own_losses`` that all losses on logits are the library's.
    """

    task: Task | None
    vocab_size: int | None
    own_losses: bool
    apart: bool
    own_labels: bool
    importance: Importance | None
    ranks: Ranks | None

    def labels_apart(self, labels: Tensor, logits: Tensor) -> bool:
        """Whether labels have a grid of their own, which a loss of the user's, or ctc, aligns."""
        if self.apart or not self.own_labels:
            return self.apart
        require_one_grid(labels, logits)
        return labels.shape != logits.shape[:-1]


class LogitStep(NamedTuple):
    """What the terms on logits of one step share."""

    lookup: Lookup
    batch: Batch
    weights: StepWeights
    beside: Beside
    rules: Rules


class Predictions(NamedTuple):
    """Logits that learn, and the weight of each prediction.

    ``items`` is the denominator, where it is not the sum of the weights. ``given`` is the number of
    items that the call brings, and ``counts`` what it counts: these predictions; labels, where a
    trainer counts them or they have a grid of their own; or of a head that looks further ahead the
    predictions of the next token. ``shift`` is how many places ahead a causal model predicts.
    """

    logits: Tensor
    task: Task | None
    weights: Tensor
    items: Tensor | None
    given: Tensor | None
    counts: Tensor
    by_labels: bool = False  # whether a trainer has counted
    shift: int = 1
    of: str = ""  # what makes them, for errors: a head; else the model

    def by(self, factors: Tensor, ranks: Ranks | None) -> "Predictions":
        """The predictions with their importance.

        A given number of predictions stays the denominator; of labels it says the batch's share.
        """
        weights, items = with_importance(self.weights, factors), self.items
        if self.given is None:
            items = denominator(None, weights, 0, ranks, factors)
        elif self.by_labels:
            items = items_elsewhere(self.given, weights, self.counts, ranks)
        return self._replace(weights=weights, items=items)


class Found(NamedTuple):
    """A term on logits, its weight in the total, and the importance of its predictions."""

    name: str
    weight: Tensor
    loss: Tensor
    factors: Tensor | None = None


def predictions(
    logits: Tensor, step: LogitStep, shift: int = 1, items: Tensor | None = None
) -> Predictions:
    """The weights of the predictions that ``logits`` are; ``items`` counts these, if it is given.

    The batch's own number of items counts predictions of the next token, and a head that looks
    further ahead makes fewer: its mean is weighed by the batch's share of the former. So is every
    mean by the batch's share of the labels, where a trainer has counted these.
    """
    rules, batch = step.rules, step.batch
    task = rules.task or ("classification" if logits.ndim == 2 else None)
    if rules.own_losses:
        require_vocabulary_last(logits, task)
        require_numbers_of_classes(batch.labels)
    require_task(task, logits, batch)
    labels, counts, own = batch.labels, None, batch
    given = batch.num_items if items is None else items
    by_labels = given is None and batch.num_items_in_batch is not None and labels is not None
    if labels is not None and rules.labels_apart(labels, logits):
        counts, own = (labels != IGNORE).float(), batch._replace(labels=None)
    elif shift > 1 and given is not None and items is None:
        counts = prediction_weights(batch, task, logits)
    if by_labels and labels is not None:
        given, counts = batch.num_items_in_batch, counted_labels(labels, task)
    weights = prediction_weights(own, task, logits, shift)
    if counts is None or given is None:
        items = denominator(given, weights, 0, rules.ranks, logits)
    else:
        items = items_elsewhere(given, weights, counts, rules.ranks)
    counts = weights if counts is None else counts
    return Predictions(logits, task, weights, items, given, counts, by_labels, shift)


def logit_term(term: LogitTerm, made: Predictions, step: LogitStep) -> Found:
    """The divergence of a model from its target."""
    targets = [step.lookup(tower, LOGITS) for tower in term.teachers]
    loss, factors = _divergence(term, made, targets, step, step.rules.importance)
    return Found(term.name, of_share(step.weights.logits, term.share), loss, factors)


def label_term(term: LabelTerm, made: Predictions, step: LogitStep) -> Found:
    """The loss of a model on the labels."""
    loss = _on_labels(term, made, step)
    return Found(term.name, of_share(step.weights.labels, term.share), loss)


def head_terms(
    head: HeadTerm, step: LogitStep, own: Tensor | None
) -> tuple[Predictions, list[Found]]:
    """The terms of further logits, under the global weights times those of the head.

    ``own`` are the model's own logits, where a term reads them.
    """
    value = step.lookup(head.student, head.tap)
    if head.has_module:
        module, rules = step.beside.heads[head.name], step.rules
        value = made_logits(head, module, value, step.batch, rules.task, rules.ranks)
    makes = "auto" if head.pools else "module" if head.has_module else ""
    require_head(value, head.name, own, makes, step.rules.own_losses, step.rules.vocab_size)
    items = (step.batch.head_items or {}).get(head.name)
    made, found = predictions(value, step, head.shift, items)._replace(of=f"head {head.name}"), []
    if (logits := head.logits) is not None:
        targets = [step.lookup(*end) for end in head.targets]
        ahead = head.shift - 1 if head.target == LOGITS and made.task == "causal_lm" else 0
        # The last predictions have no target; they weigh nothing already.
        targets = [torch.roll(t, -ahead, 1) for t in targets] if ahead else targets
        loss, _ = _divergence(logits, made, targets, step, None)
        weight = step.weights.logits * step.weights.heads[logits.name]
        found.append(Found(logits.name, weight, loss))
    if (labels := head.labels) is not None and step.batch.labels is not None:
        weight = step.weights.labels * step.weights.heads[labels.name]
        found.append(Found(labels.name, weight, _on_labels(labels, made, step)))
    return made, found


def _divergence(
    term: LogitTerm,
    made: Predictions,
    targets: list[Tensor],
    step: LogitStep,
    importance: Importance | None,
) -> tuple[Tensor, Tensor | None]:
    """The value of a term, and the importance of its predictions."""
    rules, tau = step.rules, step.weights.temperature
    learns = made.of or named_model(term.student)
    cut = [
        shared_vocabulary(made.logits, target, rules.vocab_size, (learns, named_model(tower)))
        for target, tower in zip(targets, term.teachers, strict=True)
    ]
    size = min(s.shape[-1] for s, _ in cut)
    # Padding columns that one teacher lacks have probability zero in the mean of all.
    students, teachers = zip(*((_cut(s, size), _cut(t, size)) for s, t in cut), strict=True)
    s = students[0]
    if not rules.own_losses:
        s, teachers = on_every_rank(s), tuple(map(on_every_rank, teachers))
    if term.constant:
        teachers = tuple(t.detach() for t in teachers)
    factors = None
    targets = list(teachers) if term.target == "each" else [_one_target(term, teachers, step)]
    if importance is not None:
        each = [scores_of(importance, term.loss, s, t, tau, made.weights) for t in targets]
        scores = each[0] if len(each) == 1 else torch.stack(each).mean(0)
        threshold = step.weights.threshold
        factors = factors_of(importance, scores, made.weights, rules.ranks, threshold)
        made = made.by(factors, rules.ranks)
    loss_of = step.beside.loss_of(term, rules.ranks)
    losses = [loss_of(s, t, temperature=tau, weights=made.weights) for t in targets]
    losses = [ordinary(loss, term.name) for loss in losses]
    return rescaled(_mean(losses), made.weights, 0, made.items), factors


def _mean(losses: list[Tensor]) -> Tensor:
    """The mean, as a sum with constant coefficients, which ``heads/read_total.py`` reads."""
    if len(losses) == 1:
        return losses[0]
    share = 1 / len(losses)
    total = losses[0] * share
    for loss in losses[1:]:
        total = total + loss * share
    return total


def _one_target(term: LogitTerm, teachers: tuple[Tensor, ...], step: LogitStep) -> Tensor:
    """The target of all teachers together."""
    if len(teachers) == 1:
        return teachers[0]
    weights = step.weights.teachers if term.weighs else None
    if weights is None:
        weights = torch.ones(len(teachers), device=teachers[0].device)
    tau: Tensor | float = step.weights.temperature
    pooled = pooled_by(term.loss)
    if term.target == "logits":
        tau, pooled = 1.0, "logits"
    return mean_of_teachers(list(teachers), weights, temperature=tau, pooled=pooled)


def pooled_by(loss: Loss) -> Pooled:
    """What of several teachers a loss compares with the mean of."""
    if plain_loss(loss) is mse_logits:
        return "logits"
    return "classes" if plain_loss(loss) is sigmoid_kl else "probabilities"


def _on_labels(term: LabelTerm, made: Predictions, step: LogitStep) -> Tensor:
    rules, labels = step.rules, step.batch.labels
    assert labels is not None
    assert made.task is not None
    apart = rules.labels_apart(labels, made.logits)
    aligned = labels if apart else align_labels(labels, made.task, made.shift)
    logits = made.logits if rules.own_losses else on_every_rank(made.logits)
    loss_of = step.beside.loss_of(term, rules.ranks)
    loss = ordinary(loss_of(logits, aligned, weights=made.weights), term.name)
    if not apart:
        return rescaled(loss, made.weights, 0, made.items)
    counts = (labels != IGNORE).float()
    items = denominator(made.given, counts, 0, rules.ranks, loss)
    if made.by_labels and made.given is not None:
        items = items_elsewhere(made.given, counts, made.counts, rules.ranks)
    return rescaled(loss, counts, 0, items)


@check
def require_head(
    logits: Any,
    name: str,
    own: Tensor | None,
    makes: str,
    own_losses: bool,
    vocab_size: int | None,
) -> None:
    """Raise ShapeError unless a head's value is logits on the grid of the model's ``own``.

    A module (``makes``: ``"auto"`` or ``"module"``) makes as many as these; a value of the
    student's may have other padding of the vocabulary, and with losses of the user's any width.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        what = str(logits.dtype) if isinstance(logits, Tensor) else type(logits).__name__
        raise ShapeError(f"head {name!r} gives {what}, and logits are floating point numbers")
    if own is None:
        return
    alike = logits.shape[-1] == own.shape[-1]
    if not makes:
        sizes = (logits.shape[-1], own.shape[-1])
        alike = not own_losses or differ_by_padding(*sizes, vocab_size)
    if alike and logits.shape[:-1] == own.shape[:-1]:
        return
    advice = (
        "name a value with these axes, or give the head a module that makes such logits "
        '(module="auto" pools and adds a linear layer)'
    )
    if makes == "module":
        advice = "its module has to make logits with these axes"
    if makes == "auto":
        advice = (
            'its module="auto" was made for other logits. Give wrap(..., example_inputs={...}), '
            "from which they are read, or the module itself: module="
        )
    raise ShapeError(
        f"head {name!r} gives {shown(logits.shape)}, and the student's own logits are "
        f"{shown(own.shape)}: {advice}"
    )


def _cut(logits: Tensor, size: int) -> Tensor:
    return logits if logits.shape[-1] == size else logits[..., :size]


def of_share(weight: Tensor, share: float) -> Tensor:
    """A term's share of a global weight; a share of 1 adds no node to the graph."""
    return weight if share == 1.0 else weight * share
