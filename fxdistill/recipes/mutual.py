"""``mutual``: students that teach each other, all in one graph."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from fxdistill.distiller.assemble import (
    FeatureLoss,
    LossLike,
    Parts,
    as_inputs,
    named_loss,
    placed,
    settings_of,
    tried,
)
from fxdistill.distiller.distiller import Distiller
from fxdistill.distiller.options import CompileLike, read_options
from fxdistill.distiller.pair import check_trainable, check_vocabularies
from fxdistill.distiller.settings import warn_of_zero_weights
from fxdistill.distiller.towers import Model
from fxdistill.errors import FxDistillError, OptionError, gather, raise_together
from fxdistill.graph.program import Pass
from fxdistill.losses.names import LABEL_LOSSES, LOGIT_LOSSES, is_named, loss_name
from fxdistill.mapping.matches import Mapped, Matches, parse_entries
from fxdistill.mapping.resolve import resolve
from fxdistill.mapping.teachers import Teachers
from fxdistill.models.conventions import Task, find_task
from fxdistill.models.given import check_models
from fxdistill.models.tap import Tower
from fxdistill.objective.importance import Importance, require_importance
from fxdistill.objective.make_terms import check_queues, make_terms
from fxdistill.objective.objective import Objective
from fxdistill.objective.term import LabelTerm, LogitTerm, Target, Term

Peers = Literal["logits", "probabilities", "each"]
_TARGETS: dict[str, Target] = {"logits": "logits", "probabilities": "mean", "each": "each"}


def mutual(
    students: Sequence[nn.Module],
    mapping: Mapped = None,
    *,
    logit_loss: LossLike = "forward_kl",
    temperature: float = 1.0,
    logit_weight: float = 1.0,
    label_loss: LossLike = "cross_entropy",
    label_weight: float = 1.0,
    peers: Peers = "logits",
    feature_loss: FeatureLoss = "mse",
    feature_weight: float = 1.0,
    task: str = "auto",
    vocab_size: int | None = None,
    importance: Importance | None = None,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    compile: CompileLike = True,
    outputs: str | Iterable[str] | None = (),
    passes: Iterable[Pass] = (),
    mesh: Any = None,
    student_plan: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
) -> Distiller:
    """Train students that are each other's teachers (Zhang et al., 2018), in one graph.

    L = Σ_i [label_weight · L_label(i) + logit_weight · L_logit(i)] + feature_weight · mean of the
    matches of all ordered pairs. Student i's target is made of the others' outputs, without
    gradient. ``losses`` names terms ``"0:labels"``, ``"0:logits"``, ..., and those of matches
    ``"i<-j/path"``: i learns from j.

    Args:
        students: Two models or more, which take the same inputs. ``distiller.students`` has them.
        mapping: As in ``wrap``, from a student's paths to another's; every ordered pair has all
            matches.
        logit_loss: As in ``wrap``; ``None`` for none.
        temperature: As in ``wrap``.
        logit_weight: As in ``wrap``.
        label_loss: As in ``wrap``.
        label_weight: As in ``wrap``.
        peers: The target: ``"logits"``, the softmax of the mean of the others' logits;
            ``"probabilities"``, the mean of their probabilities at τ; ``"each"``: the term is the
            mean of the divergences from each of them.
        feature_loss: As in ``wrap``.
        feature_weight: As in ``wrap``.
        task: As in ``wrap``; the first student's is taken.
        vocab_size: As in ``wrap``.
        importance: As in ``wrap``. Each student's own scores weigh what it learns, also from
            features.
        example_inputs: As in ``wrap``.
        compile: As in ``wrap``.
        outputs: As in ``wrap``; the logits are the first student's.
        passes: As in ``wrap``.
        mesh: As in ``wrap``.
        student_plan: As in ``wrap``; one for all students, or one for each.

    Returns:
        A distiller whose students are all trained; call it with their inputs and ``labels``.

    Raises:
        FxDistillError: There are fewer than two students, or one of them twice; and all that
            ``wrap`` raises.
    """
    models = _read_students(students)
    if peers not in _TARGETS:
        raise OptionError(f"peers={peers!r}: {', '.join(map(repr, _TARGETS))}")
    options = read_options(compile, outputs, tuple(passes))
    examples = as_inputs(example_inputs)
    towers, first = tuple(models), next(iter(models.values()))
    found_task = find_task(first, task)
    of_logits = named_loss(logit_loss, LOGIT_LOSSES, "logit_loss")
    of_labels = named_loss(label_loss, LABEL_LOSSES, "label_loss")
    matches, terms = _of_pairs(models, mapping, feature_loss, found_task)
    objective = Objective(
        features=terms,
        logits=tuple(
            LogitTerm(
                loss,
                f"{i}:logits",
                tower,
                tuple(t for t in towers if t != tower),
                _TARGETS[peers],
                constant=True,
            )
            for i, tower in enumerate(towers)
            for loss in of_logits
        ),
        labels=tuple(
            LabelTerm(loss, f"{i}:labels", tower)
            for i, tower in enumerate(towers)
            for loss in of_labels
        ),
        task=found_task,
        vocab_size=vocab_size,
        importance=require_importance(importance, logit_loss),
        own_losses=is_named(logit_loss) and is_named(label_loss),
        returns=towers[0] if options.outputs else None,
    )
    if objective.logits and objective.own_losses:
        check_vocabularies(itertools.combinations(models.items(), 2), vocab_size)
    weights = (logit_weight, feature_weight, label_weight, temperature)
    settings = settings_of(objective, None, weights)
    warn_of_zero_weights(objective.features)
    learning = {tower: Model(model) for tower, model in models.items()}
    names = [loss_name(loss) for loss in (logit_loss, label_loss, feature_loss) if loss]
    asked = f"{matches}\n{names} {settings} {peers}\n{options.mode} {options.outputs} {found_task}"
    keys = Teachers(models, dict(enumerate(towers)))
    plans = keys.of_each(student_plan, "student_plan")
    with placed(learning, objective, mesh, plans, asked) as found:
        parts = Parts(
            found.models,
            replace(objective, ranks=found.ranks),
            matches,
            settings,
            replace(options, gathers=mesh is not None, notes=found.notes),
            {},
            towers[0],
            towers,
        )
        return tried(parts, examples)


def _read_students(students: Any) -> dict[Tower, nn.Module]:
    """The students by the names of their towers; OptionError where they cannot teach each other."""
    if isinstance(students, nn.Module) and not isinstance(students, nn.ModuleList):
        students = [students]
    if not isinstance(students, (Sequence, nn.ModuleList)) or isinstance(students, str):
        raise OptionError(f"students is a {type(students).__name__}: a list of two models or more")
    models = {f"student{i}": model for i, model in enumerate(students)}
    if len(models) < 2:
        raise OptionError(
            f"mutual() got {len(models)} student: its teachers are other students, so there must "
            "be two or more. wrap(student, None) trains one without a teacher."
        )
    check_models(**models)
    for (a, x), (b, y) in itertools.combinations(models.items(), 2):
        if x is y:
            raise OptionError(
                f"{a} and {b} are one model, which would learn to be what it is: give one of them "
                "a copy"
            )
    for model in models.values():
        check_trainable(model)
    return models


def _of_pairs(
    models: Mapping[Tower, nn.Module],
    mapping: Mapped,
    feature_loss: FeatureLoss,
    task: Task | None,
) -> tuple[Matches, tuple[Term, ...]]:
    """The matches of all ordered pairs of students, and their terms."""
    problems: list[FxDistillError] = []
    matches, terms = Matches(), list[Term]()
    for match in parse_entries(mapping)[0]:
        if match.of is not None:
            raise OptionError(
                f"of={match.of!r} for {match.student!r}: in mutual() every student is the teacher "
                "of every other"
            )
    for (i, (a, learns)), (j, (b, other)) in itertools.permutations(enumerate(models.items()), 2):
        found = gather(problems, resolve, learns, other, mapping)
        if found is None:
            break  # other pairs would say the same again
        peer = Teachers({b: other}, {0: b})
        made = gather(problems, make_terms, learns, found, feature_loss, task, peer)
        matches.extend(found)
        matches.notes = tuple(dict.fromkeys((*matches.notes, *found.notes)))
        terms += [
            replace(term, name=f"{i}<-{j}/{term.name}", of=(a, b), constant=True)
            for term in made or ()
        ]
    if not problems:  # a pair's own matches may share a queue, too: it would be said twice
        gather(problems, check_queues, terms)
    raise_together(problems)
    return matches, tuple(terms)
