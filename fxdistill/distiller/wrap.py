"""``wrap``: make a Distiller from models and options, and check everything that can be checked."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fxdistill.base.warn import warn
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
from fxdistill.distiller.pair import (
    check_targets,
    check_trainable,
    check_vocabularies,
)
from fxdistill.distiller.settings import (
    Setting,
    TeacherWeights,
    teacher_settings,
    warn_of_zero_weights,
)
from fxdistill.distiller.towers import Model
from fxdistill.errors import FxDistillError, MatchWarning, OptionError, gather, raise_together
from fxdistill.graph.program import Pass
from fxdistill.losses.names import LABEL_LOSSES, LOGIT_LOSSES, is_named, loss_name
from fxdistill.mapping.matches import Mapped, Matches, parse_entries
from fxdistill.mapping.resolve import resolve
from fxdistill.mapping.teachers import Teachers, read_teachers
from fxdistill.models.conventions import find_task
from fxdistill.models.given import check_models
from fxdistill.models.modes import modes_kept_on_error
from fxdistill.objective.head import Head, head_terms_of
from fxdistill.objective.importance import Importance, require_importance
from fxdistill.objective.make_terms import check_options, make_terms
from fxdistill.objective.objective import Objective
from fxdistill.objective.term import LabelTerm, LogitTerm


def wrap(
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module] | None,
    mapping: Mapped = None,
    *,
    heads: Mapping[str, Head] | None = None,
    teacher_weights: TeacherWeights | None = None,
    feature_loss: FeatureLoss = "mse",
    pairs_loss: Callable[..., Tensor] | None = None,
    feature_weight: float = 1.0,
    logit_loss: LossLike = "forward_kl",
    logit_weight: float = 1.0,
    temperature: float = 1.0,
    label_loss: LossLike = "cross_entropy",
    label_weight: float = 1.0,
    task: str = "auto",
    vocab_size: int | None = None,
    importance: Importance | None = None,
    freeze_teacher: bool = True,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    compile: CompileLike = True,
    outputs: str | Iterable[str] | None = (),
    passes: Iterable[Pass] = (),
    mesh: Any = None,
    student_plan: Mapping[str, Any] | None = None,
    teacher_plan: Mapping[str, Any] | None = None,
) -> Distiller:
    """Combine student, teacher and losses into one module that is called like a model.

    L = logit_weight · L_logit + feature_weight · (1/N) Σ weight_i · loss_i + label_weight · L_label

    Any part may be missing: without ``mapping``, with ``logit_loss=None``, or in a call without
    labels.

    Args:
        student: The model to train. Without a ``mesh``, ``wrap`` changes nothing in it.
        teacher: The model to learn from. With ``freeze_teacher`` it runs under ``no_grad`` and in
            eval mode. Several, in a list or by name in a dict: the logit loss compares with the
            mean of their probabilities at τ (of ``mse_logits`` of their logits), and matches say
            which is theirs (``Match(of=...)``). ``None``: the student learns from labels, and
            from itself (``of="self"``, ``Head(teacher="self")``).
        mapping: ``{student path: teacher path or Match}``, or a list of ``Match``. In a path, ``*``
            stands for one segment, ``**`` for any number of them, and ``{i}`` for a number that the
            other side may compute with (``{2*i+1}``). ``fxdistill.match`` proposes a mapping.
        heads: Further logits of the student by name, each an ``fxdistill.Head``: auxiliary
            classifiers, and heads that predict more tokens.
        teacher_weights: The weights of several teachers in the mean, one for each, in order or by
            name; they are divided by their sum. Default: equal. ``distiller.set`` changes them.
        feature_loss: The loss of matches that name none: "mse", "l2", "smooth_l1", "l1", "cosine",
            "fitnet"; "attention_transfer", "fpn" (maps); "gram", "distance_wise", "angle_wise",
            "similarity_preserving", "info_nce", "CRD" (samples); "detection_classification",
            "detection_box"; or a callable ``(student, teacher, weights) -> scalar``, which may be a
            module with parameters. A callable must return
            Σ w·value / Σ w over the weights it gets: the losses of ranks with different samples are
            combined on that assumption. With the port "attention": "attention_kl", "attention_mse",
            "relation_kl", "transfer_matrix".
        pairs_loss: A callable ``(students, teachers, weights) -> scalar`` that takes the place of
            ``feature_loss``: it gets lists with an entry for each match that names no loss, after
            ``rearrange``, ``reduce`` and ``project``. Its value is one term, named "pairs".
        feature_weight: The weight of the mean over all N matches ("pairs" counts as one).
        logit_loss: "forward_kl", "reverse_kl", "jsd", "soft_cross_entropy", "total_variation",
            "mse_logits" (without τ), "sigmoid_kl" (classes that do not exclude each other), or a
            callable ``(student_logits, teacher_logits, *, temperature, weights) -> scalar``;
            ``None`` for none.
        logit_weight: The weight of the logit loss.
        temperature: The τ of the logit loss.
        label_loss: "cross_entropy", "ctc" (speech), or a callable ``(student_logits, labels, *,
            weights) -> scalar``; it applies to calls with labels. ``None`` for none.
        label_weight: The weight of the label loss.
        task: How labels line up with logits: "causal_lm" (shifted by one), "masked_lm", "seq2seq",
            "classification", or "auto" to read it from the model.
        vocab_size: The number of real vocabulary columns, needed where the two models' numbers of
            columns differ by more than 5 %.
        importance: An ``fxdistill.Importance``: which predictions weigh how much in the logit loss.
        freeze_teacher: ``False`` trains the teacher too.
        example_inputs: Keyword arguments of a call, or a tuple of positional ones. ``wrap`` checks
            the capture, paths and shapes on them, and reads the widths of projections from them; it
            executes nothing.
        compile: ``True``: one graph, compiled by Inductor. ``"regional"``: the models run as they
            are, and the losses are one compiled graph. ``False``: everything runs eagerly. A dict:
            one graph, with ``backend``, ``options``, ``mode`` and ``dynamic`` as in
            ``torch.compile``; ``fallback="regional"`` switches to that mode, with a warning, when
            the models cannot be captured; ``fuse_head=False`` makes the logits even if only losses
            read them; ``disable=("FormGradients",)`` leaves passes out by name.
        outputs: ``"logits"`` adds the student's logits, detached, to the output. In eval mode
            under ``no_grad`` they are there unasked, where a term reads them; ``None`` leaves them
            out there too.
        passes: Your own passes; they run on the joint program, after compose.
        mesh: A DeviceMesh with dimensions named "dp" (each rank has its own samples, and parameters
            are sharded), "tp" (tensor and sequence parallel) or "replicate" (each rank has its own
            samples only). Parameters become DTensors in place: create optimizers after ``wrap``.
            Leave it out for models that are parallel already.
        student_plan: With "tp", ``{module pattern: ParallelStyle}`` or ``{parameter pattern:
            placement}``; ``None`` takes the ready-made plan for the structure of the model.
        teacher_plan: The same for the teacher.

    Returns:
        A module; call it with the inputs of the models, and with ``labels``.

    Raises:
        FxDistillError: A subclass for each kind of mistake; see ``fxdistill.errors``.
    """
    check_models(student=student)
    teachers = read_teachers(teacher)
    check_trainable(student)
    options = read_options(compile, outputs, tuple(passes))
    examples = as_inputs(example_inputs)
    matches = _resolved(student, teacher, teachers, mapping, feature_loss)
    found_task = find_task(student, task)
    of_logits = named_loss(logit_loss, LOGIT_LOSSES, "logit_loss")
    of_labels = named_loss(label_loss, LABEL_LOSSES, "label_loss")
    objective = Objective(
        features=make_terms(student, matches, feature_loss, found_task, teachers, pairs_loss),
        logits=tuple(LogitTerm(loss, teachers=tuple(teachers.models)) for loss in of_logits)
        if teachers.models
        else (),
        labels=tuple(map(LabelTerm, of_labels)),
        heads=head_terms_of(heads, student, teachers, (of_logits, of_labels), found_task),
        task=found_task,
        vocab_size=vocab_size,
        importance=require_importance(importance, logit_loss if teachers.models else None),
        own_losses=is_named(logit_loss) and is_named(label_loss),
        returns="student" if options.outputs else None,
    )
    if objective.logits and objective.own_losses:
        check_vocabularies(
            [(("student", student), each) for each in teachers.models.items()], vocab_size
        )
    settings = settings_of(
        objective, heads, (logit_weight, feature_weight, label_weight, temperature)
    )
    settings |= _teacher_settings(objective, teachers, teacher_weights)
    warn_of_zero_weights(objective.features)
    if mapping is None and (feature_loss != "mse" or feature_weight != 1.0 or pairs_loss):
        warn(
            "feature_loss, feature_weight and pairs_loss are about matches, and there is no "
            "mapping: nothing is compared. fxdistill.match proposes one",
            MatchWarning,
        )
    if freeze_teacher:
        for model in teachers.models.values():
            check_targets(student, model)
    models = {name: Model(model, not freeze_teacher) for name, model in teachers.models.items()}
    models["student"] = Model(student)
    losses = [
        loss_name(loss) for loss in (logit_loss, label_loss, feature_loss, pairs_loss) if loss
    ]
    asked = f"{matches}\n{losses} {settings}\n{options.mode} {options.outputs} {found_task}"
    asked += f" {importance} {sorted(heads or ())}"
    plans = {"student": student_plan, **teachers.of_each(teacher_plan, "teacher_plan")}
    with contextlib.ExitStack() as stack:
        for model in teachers.models.values():
            stack.enter_context(modes_kept_on_error(model))
        found = stack.enter_context(placed(models, objective, mesh, plans, asked))
        parts = Parts(
            found.models,
            replace(objective, ranks=found.ranks),
            matches,
            settings,
            replace(options, gathers=mesh is not None, notes=found.notes),
            dict(heads or {}),
        )
        return tried(parts, examples)


def _teacher_settings(
    objective: Objective, teachers: Teachers, given: TeacherWeights | None
) -> dict[str, Setting]:
    """The weights of several teachers, equal where none are given."""
    mixed = objective.names.teachers
    if given is not None and not mixed:
        raise OptionError(
            "teacher_weights says how the logits of several teachers are averaged, and "
            + ("there is no logit loss" if len(teachers.models) > 1 else "there are not several")
        )
    return teacher_settings([1.0] * len(mixed) if given is None else given, mixed) if mixed else {}


# ---------------------------------------------------------------------- matches and losses


def _resolved(
    student: nn.Module, teacher: Any, teachers: Teachers, mapping: Mapped, default: FeatureLoss
) -> Matches:
    """The explicit matches; if they cannot be resolved, the errors of their options come too."""
    problems: list[FxDistillError] = []
    matches = gather(problems, resolve, student, teacher, mapping)
    if matches is not None:
        return matches
    for match in parse_entries(mapping)[0]:
        check_options(match, str(match.student), student, default, problems)
    raise_together(problems)
    raise AssertionError("resolve has raised, so there is a problem")
