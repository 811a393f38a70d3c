"""``wrap``: make a Distiller from models and options, and check everything that can be checked."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxdistill import parallel
from fxdistill.base.ranks import Ranks
from fxdistill.base.tensors import is_placed
from fxdistill.distiller import dry
from fxdistill.distiller.distiller import Distiller
from fxdistill.distiller.guard import check_call
from fxdistill.distiller.modes import Request, Steps
from fxdistill.distiller.options import CompileLike, Options, read_options
from fxdistill.distiller.pair import check_models, check_targets, check_trainable
from fxdistill.distiller.settings import Settings, check_settings, warn_of_zero_weights
from fxdistill.distiller.towers import Model, Towers
from fxdistill.errors import (
    CaptureError,
    FxDistillError,
    OptionError,
    ProjectionError,
    StepError,
    gather,
    raise_together,
)
from fxdistill.graph.program import Pass
from fxdistill.losses.names import LABEL_LOSSES, LOGIT_LOSSES, Loss, is_named, loss_name, loss_of
from fxdistill.mapping.matches import Mapped, Matches, parse_entries
from fxdistill.mapping.resolve import resolve
from fxdistill.models.conventions import find_task
from fxdistill.models.devices import device_of
from fxdistill.models.dummy_inputs import dummy_inputs
from fxdistill.models.landmarks import vocabulary_of
from fxdistill.models.modes import buffers_kept_on_error, modes_kept_on_error
from fxdistill.models.tap import Tower
from fxdistill.objective.beside import Beside
from fxdistill.objective.call import Inputs, sort_call
from fxdistill.objective.importance import Importance, require_importance
from fxdistill.objective.make_terms import (
    Shapes,
    asks_for_width,
    check_options,
    make_terms,
    with_projections,
)
from fxdistill.objective.objective import Objective
from fxdistill.objective.term import PAIRS, LabelTerm, LogitTerm
from fxdistill.objective.vocabulary import require_padding_only

FeatureLoss = str | Callable[..., Tensor]
LossLike = str | Callable[..., Tensor] | None


def wrap(
    student: nn.Module,
    teacher: nn.Module,
    mapping: Mapped = None,
    *,
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
    outputs: Iterable[str] | None = (),
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
            eval mode.
        mapping: ``{student path: teacher path or Match}``, or a list of ``Match``. In a path, ``*``
            stands for one segment, ``**`` for any number of them, and ``{i}`` for a number that the
            other side may compute with (``{2*i+1}``). ``fxdistill.match`` proposes a mapping.
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
        outputs: ``("logits",)`` adds the student's logits, detached, to the output. In eval mode
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
    check_models(student=student, teacher=teacher)
    check_trainable(student)
    options = read_options(compile, None if outputs is None else tuple(outputs), tuple(passes))
    examples = _as_inputs(example_inputs)
    matches = _resolved(student, teacher, mapping, feature_loss)
    found_task = find_task(student, task)
    objective = Objective(
        features=make_terms(student, matches, feature_loss, found_task, pairs_loss),
        logits=tuple(map(LogitTerm, _named(logit_loss, LOGIT_LOSSES, "logit_loss"))),
        labels=tuple(map(LabelTerm, _named(label_loss, LABEL_LOSSES, "label_loss"))),
        task=found_task,
        vocab_size=vocab_size,
        importance=require_importance(importance, logit_loss),
        own_losses=is_named(logit_loss) and is_named(label_loss),
        returns="student" if options.outputs else None,
    )
    if objective.logits and objective.own_losses:
        _check_vocabularies(student, teacher, vocab_size)
    settings = {
        "logit_weight": logit_weight,
        "feature_weight": feature_weight,
        "label_weight": label_weight,
        "temperature": temperature,
        **{term.name: term.weight for term in objective.features if not term.in_pairs},
        **({PAIRS: 1.0} if PAIRS in objective.weighed else {}),
    }
    check_settings(settings)
    warn_of_zero_weights(objective.features)
    if freeze_teacher:
        check_targets(student, teacher)
    models = {"teacher": Model(teacher, not freeze_teacher), "student": Model(student)}
    losses = [
        loss_name(loss) for loss in (logit_loss, label_loss, feature_loss, pairs_loss) if loss
    ]
    asked = f"{matches}\n{losses} {settings}\n{options.mode} {options.outputs} {found_task}"
    asked += f" {importance}"
    plans = {"student": student_plan, "teacher": teacher_plan}
    with modes_kept_on_error(teacher), _placed(models, objective, mesh, plans, asked) as placed:
        parts = Parts(
            placed.models,
            replace(objective, ranks=placed.ranks),
            matches,
            settings,
            replace(options, gathers=mesh is not None, notes=placed.notes),
        )
        return _tried(parts, examples)


class Placed(NamedTuple):
    """The models, placed on the mesh if there is one."""

    models: Mapping[Tower, Model]
    ranks: Ranks | None = None
    notes: tuple[str, ...] = ()


class Parts(NamedTuple):
    """The parts of a distiller without its projections."""

    models: Mapping[Tower, Model]
    objective: Objective
    matches: Matches
    settings: Mapping[str, float]
    options: Options


def _as_inputs(examples: Mapping[str, Any] | tuple[Any, ...] | None) -> Inputs | None:
    if examples is None:
        return None
    if not isinstance(examples, (tuple, Mapping)):
        raise OptionError(
            f"example_inputs is a {type(examples).__name__}: a dict of the keywords of a call, or "
            "a tuple of its positional arguments"
        )
    return Inputs(examples, {}) if isinstance(examples, tuple) else Inputs((), dict(examples))


# ---------------------------------------------------------------------- matches and losses


def _resolved(
    student: nn.Module, teacher: nn.Module, mapping: Mapped, default: FeatureLoss
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


def _named(loss: LossLike, table: dict[str, Loss], what: str) -> tuple[Loss, ...]:
    """The loss as a tuple of one; an empty tuple for ``None``, which turns it off."""
    return () if loss is None else (loss_of(loss, table, what),)


def _check_vocabularies(student: nn.Module, teacher: nn.Module, vocab_size: int | None) -> None:
    """Raise VocabularyError now and not in the first step, where both heads tell their width."""
    sizes = vocabulary_of(student), vocabulary_of(teacher)
    if sizes[0] is not None and sizes[1] is not None:
        require_padding_only(sizes[0], sizes[1], vocab_size)


# ---------------------------------------------------------------------- placement


@contextlib.contextmanager
def _placed(
    models: Mapping[Tower, Model],
    objective: Objective,
    mesh: Any,
    plans: Mapping[Tower, Mapping[str, Any] | None],
    asked: str,
) -> Iterator[Placed]:
    """Put the models on the mesh, if there is one; undo that if the body raises."""
    if mesh is None:
        if any(plan is not None for plan in plans.values()):
            raise OptionError("student_plan and teacher_plan are for models on a mesh: mesh=...")
        yield Placed(models)
        return
    modules = {tower: models[tower].module for tower in plans}
    taps = [end for term in objective.features for end in term.taps]
    frozen = [tower for tower, model in models.items() if not model.trains]
    with (
        parallel.sharding.kept_on_error(*modules.values()),
        buffers_kept_on_error(*modules.values()),
    ):
        found = parallel.setup.set_up(modules, plans, mesh, taps, asked, frozen)
        sharded = {t: replace(model, sharding=found.shardings[t]) for t, model in models.items()}
        yield Placed(sharded, found.ranks, found.notes)


# ---------------------------------------------------------------------- projections, and a check


def _tried(parts: Parts, examples: Inputs | None) -> Distiller:
    """Make the distiller with its projections, and check it on the examples."""
    problems: list[FxDistillError] = []
    distiller = _with_projections(parts, examples, problems)
    if examples is None:
        raise_together(problems)
        return distiller
    check = functools.partial(distiller.check, *examples.args, **examples.kwargs)
    if problems:  # report the errors of the check together with them
        gather(problems, check)
        raise_together(problems)
    check()
    return distiller


def _with_projections(
    parts: Parts, examples: Inputs | None, problems: list[FxDistillError]
) -> Distiller:
    models, objective = parts.models, parts.objective
    modules = {tower: model.module for tower, model in models.items()}
    shapes, wrong = _shapes(parts, examples), list[FxDistillError]()
    given = (objective.features, parts.matches, modules)
    terms, projections = with_projections(*given, shapes, wrong)
    if any(isinstance(error, ProjectionError) for error in wrong) and examples is None:
        # Structure does not tell all widths: ask a run on fake tensors, if inputs can be made.
        shapes, again = _dummy_shapes(parts), list[FxDistillError]()
        terms, projections = with_projections(*given, shapes, again)
        wrong = again
    problems += wrong
    objective = replace(objective, features=terms)
    objective.with_modules(losses := nn.ModuleList())
    _make_alike((projections, losses), modules.values())
    rest = (parts.matches, parts.settings, parts.options)
    return Distiller(models, objective, projections, *rest)


def _dummy_shapes(parts: Parts) -> Shapes:
    """The shapes at the taps on inputs made for each model; empty where that cannot be told."""
    made = {tower: dummy_inputs(model.module) for tower, model in parts.models.items()}
    if any(inputs is None for inputs in made.values()):
        return {}
    examples = Inputs((), {f"{tower}_inputs": inputs for tower, inputs in made.items()})
    try:
        values = dry.fake_values(_request(parts, examples), Steps())
    except StepError:
        return {}
    except Exception:  # of the models' own code: a capture may go another way
        return _shapes(parts, examples)
    return {end: torch.empty(value.shape, device="meta") for end, value in values.items()}


def _shapes(parts: Parts, examples: Inputs | None) -> Shapes:
    """The shapes at the taps on the examples; empty if no projection needs them."""
    if examples is None or not asks_for_width(parts.objective.features, parts.matches):
        return {}
    # The check that follows reports a step that cannot be captured, with advice.
    with contextlib.suppress(CaptureError):
        return dry.tapped_shapes(_request(parts, examples), Steps())
    return {}


def _request(parts: Parts, examples: Inputs) -> Request:
    """A step of the models without projections."""
    towers, objective = (
        Towers(parts.models, Beside(nn.ModuleList(), nn.ModuleList()), "student"),
        parts.objective,
    )
    call = sort_call(towers.modules, towers.main, objective.task, *examples)
    check_call(towers, objective, call)
    settings = Settings(parts.settings, objective.weighed).made(device_of(towers.main_module))
    return Request(towers, objective, call, settings)


def _make_alike(beside: Iterable[nn.ModuleList], models: Iterable[nn.Module]) -> None:
    """Copy the projections and loss modules of the mesh's first rank, made at random, to all."""
    found = {p.device_mesh for model in models for p in model.parameters() if is_placed(p)}
    made = [module for modules in beside for module in modules]
    if made and found:
        parallel.setup.make_alike(made, found)
