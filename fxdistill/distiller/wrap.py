"""``wrap``: options in, Distiller out. Everything that can be checked is checked here."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fxdistill import parallel
from fxdistill.base.tensors import is_placed
from fxdistill.compiler.lower import Lowering, check_lowering, mode_options
from fxdistill.distiller.distiller import Distiller
from fxdistill.distiller.options import Mode, Plan
from fxdistill.distiller.settings import check_settings, warn_of_zero_weights
from fxdistill.errors import (
    CaptureError,
    FrozenStudentError,
    FxDistillError,
    OptionError,
    did_you_mean,
    gather,
    raise_together,
)
from fxdistill.graph.program import Pass
from fxdistill.losses.names import LABEL_LOSSES, LOGIT_LOSSES, is_named, loss_name, resolve
from fxdistill.mapping.matches import Mapped, Matches, entries
from fxdistill.mapping.resolve import resolve as resolve_matches
from fxdistill.models.conventions import find_task
from fxdistill.models.landmarks import vocabulary_of
from fxdistill.models.modes import buffers_kept_on_error, modes_kept_on_error
from fxdistill.objective.call import Inputs
from fxdistill.objective.make_terms import (
    Shapes,
    asks_for_width,
    check_options,
    make_terms,
    with_projections,
)
from fxdistill.objective.objective import Objective
from fxdistill.objective.vocabulary import require_padding_only
from fxdistill.passes import CountCollectives, GatherLate, KeepTeacher, PackReductions

LossLike = str | Callable[..., Tensor] | None
_COMPILE_KEYS = ("backend", "options", "mode", "dynamic", "fallback", "fuse_head")


def wrap(
    student: nn.Module,
    teacher: nn.Module,
    mapping: Mapped = None,
    *,
    feature_loss: str | Callable[..., Tensor] = "mse",
    feature_weight: float = 1.0,
    logit_loss: LossLike = "forward_kl",
    logit_weight: float = 1.0,
    temperature: float = 1.0,
    label_loss: LossLike = "cross_entropy",
    label_weight: float = 1.0,
    task: str = "auto",
    vocab_size: int | None = None,
    freeze_teacher: bool = True,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    compile: bool | str | Mapping[str, Any] = True,
    outputs: Iterable[str] = (),
    passes: Iterable[Pass] = (),
    mesh: Any = None,
    student_plan: Mapping[str, Any] | None = None,
    teacher_plan: Mapping[str, Any] | None = None,
) -> Distiller:
    """Make student, teacher and losses one module that is called like a model.

    L = logit_weight · L_logit + feature_weight · (1/N) Σ weight_i · loss_i + label_weight ·
    L_label, of which any part may be missing: no ``mapping``, ``logit_loss=None``, no labels in the
    call.

    Args:
        student: The model to train. Nothing of it is changed, now or later.
        teacher: The model to learn from; run under ``no_grad`` and in eval mode if
            ``freeze_teacher``.
        mapping: ``{student path: teacher path or Match}``, or a list of ``Match``. ``*`` stands for
            one path segment, ``**`` for any number of them, ``{i}`` for a number that the other
            side may compute with (``{2*i+1}``). ``fxdistill.match`` proposes one.
        feature_loss: Name or callable ``(student, teacher, weights) -> scalar`` for matches that
            name none: mse, l2, smooth_l1, l1, cosine. One of your own returns Σ w·value / Σ w of
            the weights it is given: ranks that have other samples are put together by that.
        feature_weight: λ above.
        logit_loss: Name or callable ``(student_logits, teacher_logits, *, temperature, weights)``:
            forward_kl, reverse_kl, jsd, soft_cross_entropy.
        logit_weight: Its weight.
        temperature: τ of the logit loss.
        label_loss: Name or callable ``(student_logits, labels, *, weights)``, used where labels are
            passed.
        label_weight: Its weight.
        task: How labels line up with logits: "causal_lm" (shifted by one), "masked_lm", "seq2seq",
            "classification", or "auto" to read it from the model.
        vocab_size: How many vocabulary columns are real, where the two models differ by more than
            5 %.
        freeze_teacher: ``False`` trains the teacher too.
        example_inputs: Keyword arguments (or a tuple of positional ones) of a call. The capture,
            paths and shapes are checked on them now, and widths of projections are read from them;
            nothing is executed.
        compile: ``True``: one graph, by Inductor. ``"regional"``: the models run as they are and
            the losses are one compiled graph. ``False``: all eager. A dict: one graph with
            ``backend``, ``options``, ``mode``, ``dynamic`` as of ``torch.compile``,
            ``fallback="regional"`` to go there, with a warning, when the models cannot be captured,
            and ``fuse_head=False`` to make the logits even if only losses read them.
        outputs: ``("logits",)`` adds the student's logits to the output, detached.
        passes: Passes of your own, run on the joint program after compose.
        mesh: A DeviceMesh with dimensions named "dp" (each rank brings its own samples, and
            parameters are sharded), "tp" (tensor and sequence parallel) or "replicate" (samples
            only). Parameters become DTensors in place: make optimizers behind ``wrap``. Leave it
            out for models that are parallel already.
        student_plan: With "tp", ``{module pattern: ParallelStyle}`` or ``{parameter pattern:
            placement}``; ``None``: the ready-made plan for the structure of the model.
        teacher_plan: Likewise.

    Raises:
        FxDistillError: A subclass for each thing that can be wrong; see ``fxdistill.errors``.
    """
    check_trainable(student)
    plan = _plan(compile, tuple(outputs), tuple(passes), freeze_teacher)
    found_task = find_task(student, task)
    matches = _resolved(student, teacher, mapping, feature_loss)
    objective = Objective(
        features=make_terms(student, matches, feature_loss, found_task),
        logit_loss=_optional(logit_loss, LOGIT_LOSSES, "logit_loss"),
        label_loss=_optional(label_loss, LABEL_LOSSES, "label_loss"),
        task=found_task,
        vocab_size=vocab_size,
        freeze_teacher=freeze_teacher,
        own_losses=is_named(logit_loss) and is_named(label_loss),
    )
    if objective.logit_loss is not None and objective.own_losses:
        _check_vocabularies(student, teacher, vocab_size)
    settings = {
        "logit_weight": logit_weight,
        "feature_weight": feature_weight,
        "label_weight": label_weight,
        "temperature": temperature,
        **{term.name: term.weight for term in objective.features},
    }
    check_settings(settings)
    warn_of_zero_weights(objective.features)
    build = functools.partial(_built, student, teacher)
    rest = (matches, settings)
    if mesh is None:
        if student_plan is not None or teacher_plan is not None:
            raise OptionError("student_plan and teacher_plan are for models on a mesh: mesh=...")
        return build(objective, *rest, plan, _as_inputs(example_inputs))
    models = {"student": student, "teacher": teacher}
    plans = {"student": student_plan, "teacher": teacher_plan}
    with parallel.sharding.kept_on_error(student, teacher), buffers_kept_on_error(student, teacher):
        losses = [loss_name(loss) for loss in (logit_loss, label_loss, feature_loss) if loss]
        asked = f"{matches}\n{losses} {settings}\n{plan.mode} {plan.outputs} {found_task}"
        taps = [end for term in objective.features for end in term.taps]
        placed = parallel.setup.set_up(models, plans, mesh, taps, asked, freeze_teacher)
        late = replace(plan.lowering, joint_passes=(GatherLate(), *plan.lowering.joint_passes))
        plan = replace(plan, lowering=late, shardings=placed.shardings, notes=placed.notes)
        objective = replace(objective, ranks=placed.ranks)
        return build(objective, *rest, plan, _as_inputs(example_inputs))


def _resolved(
    student: nn.Module,
    teacher: nn.Module,
    mapping: Mapped,
    default: str | Callable[..., Tensor],
) -> Matches:
    """The explicit matches; where there are none to be had, options are checked all the same."""
    problems: list[FxDistillError] = []
    matches = gather(problems, resolve_matches, student, teacher, mapping)
    if matches is not None:
        return matches
    for read, *entry in gather([], entries, mapping) or ():
        if (match := gather([], read, *entry)) is not None:
            check_options(match, str(match.student), student, default, problems)
    raise_together(problems)
    raise AssertionError("what cannot be resolved is a problem")


def _built(
    student: nn.Module,
    teacher: nn.Module,
    objective: Objective,
    matches: Matches,
    settings: Mapping[str, float],
    plan: Plan,
    examples: Inputs | None,
) -> Distiller:
    """Make the distiller and try it on the examples; an error puts the teacher's modes back."""
    with modes_kept_on_error(teacher):
        shapes: Shapes = {}
        if examples is not None and asks_for_width(matches):
            probe = Distiller(student, teacher, objective, nn.ModuleList(), matches, settings, plan)
            # What cannot be captured is reported below, with what can be done about it.
            with contextlib.suppress(CaptureError):
                shapes = probe.tapped_shapes(*examples.args, **examples.kwargs)
        problems: list[FxDistillError] = []
        terms, projections = with_projections(
            objective.features, matches, student, teacher, shapes, problems
        )
        _make_alike(projections, (student, teacher))
        objective = replace(objective, features=terms)
        distiller = Distiller(student, teacher, objective, projections, matches, settings, plan)
        if problems and examples is not None:  # what else is wrong, told with it
            check = functools.partial(distiller.check, *examples.args, **examples.kwargs)
            gather(problems, check)
        raise_together(problems)
        if examples is None:
            return distiller
        try:
            distiller.check(*examples.args, **examples.kwargs)
        except CaptureError as error:
            if plan.mode == "one_graph" and not plan.fallback:
                raise
            warnings.warn(f"the example inputs could not be checked: {error}", stacklevel=3)
        return distiller


def _make_alike(projections: nn.ModuleList, models: Iterable[nn.Module]) -> None:
    """Projections that were made at random are, on a mesh, those of its first rank."""
    found = {p.device_mesh for model in models for p in model.parameters() if is_placed(p)}
    if len(projections) and found:
        parallel.setup.make_alike(projections, found)


def _as_inputs(examples: Mapping[str, Any] | tuple[Any, ...] | None) -> Inputs | None:
    if examples is None:
        return None
    if not isinstance(examples, (tuple, Mapping)):
        raise OptionError(
            f"example_inputs is a {type(examples).__name__}: a dict of the keywords of a call, or "
            "a tuple of its positional arguments"
        )
    return Inputs(examples, {}) if isinstance(examples, tuple) else Inputs((), dict(examples))


def _check_vocabularies(student: nn.Module, teacher: nn.Module, vocab_size: int | None) -> None:
    """Raise now what the first step would: both heads say how wide the logits are."""
    sizes = vocabulary_of(student), vocabulary_of(teacher)
    if sizes[0] is not None and sizes[1] is not None:
        require_padding_only(sizes[0], sizes[1], vocab_size)


def _optional(loss: LossLike, table: dict[str, Any], what: str) -> Any:
    return None if loss is None else resolve(loss, table, what)


def _plan(
    compile: bool | str | Mapping[str, Any],
    outputs: tuple[str, ...],
    passes: tuple[Pass, ...],
    freeze_teacher: bool,
) -> Plan:
    for name in outputs:
        if name != "logits":
            raise OptionError(f"outputs={outputs!r}: only 'logits' can be asked for")
    options: Mapping[str, Any] = compile if isinstance(compile, Mapping) else {}
    for key in options:
        if key not in _COMPILE_KEYS:
            near = did_you_mean(key, _COMPILE_KEYS)
            raise OptionError(f"compile={{{key!r}: ...}} is no option. Nearest: {near}.")
    if isinstance(compile, str) and compile != "regional":
        raise OptionError(f"compile={compile!r}: True, False, 'regional', or a dict of options")
    if options.get("fallback") not in (None, "regional"):
        raise OptionError("compile's fallback can only be 'regional'")
    mode: Mode = "regional" if compile == "regional" else "one_graph" if compile else "eager"
    if isinstance(compile, Mapping):
        mode = "one_graph"
    if passes and mode != "one_graph":
        raise OptionError(f"passes work on the one graph, and compile={compile!r} makes none")
    lowering = Lowering(
        options.get("backend", "inductor"),
        _inductor_options(options),
        (*((KeepTeacher(),) if freeze_teacher else ()), PackReductions(), CountCollectives()),
    )
    check_lowering(lowering)
    return Plan(
        mode=mode,
        lowering=lowering,
        dynamic=options.get("dynamic"),
        fallback=options.get("fallback") is not None,
        passes=passes,
        fuse_head=bool(options.get("fuse_head", True)),
        freeze_teacher=freeze_teacher,
        outputs=outputs,
    )


def _inductor_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """``mode`` means what it means to ``torch.compile``: a named set of Inductor options."""
    backend, mode = options.get("backend", "inductor"), options.get("mode")
    named: dict[str, Any] = {}
    if mode is not None:
        if backend != "inductor":
            raise OptionError(f"mode={mode!r} names options of Inductor, not of {backend!r}")
        named = mode_options(mode, options.get("dynamic"))
    if backend == "aot_eager" and options.get("options"):
        raise OptionError(f"the backend 'aot_eager' takes no options: {options['options']!r}")
    return {**named, **options.get("options", {})}


def check_trainable(student: nn.Module) -> None:
    """Raise FrozenStudentError where there is nothing to train."""
    parameters = list(student.parameters())
    if not any(p.requires_grad for p in parameters):
        raise FrozenStudentError(
            f"none of the student's {len(parameters)} parameters requires a gradient: there is "
            "nothing to train. student.requires_grad_(True), or unfreeze the part to train."
        )
