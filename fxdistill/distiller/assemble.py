"""Make a Distiller from its parts: placed on a mesh, with projections and heads, and checked."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxdistill import parallel
from fxdistill.base.ranks import Ranks
from fxdistill.base.tensors import is_placed
from fxdistill.distiller import channels, dry
from fxdistill.distiller.distiller import Distiller
from fxdistill.distiller.guard import check_call
from fxdistill.distiller.modes import Request, Steps
from fxdistill.distiller.options import Options
from fxdistill.distiller.settings import Setting, Settings, check_settings
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
from fxdistill.losses.names import Loss, loss_of
from fxdistill.mapping.matches import Matches
from fxdistill.models.devices import device_of
from fxdistill.models.dummy_inputs import dummy_inputs
from fxdistill.models.modes import buffers_kept_on_error
from fxdistill.models.tap import Tower
from fxdistill.objective.beside import Beside
from fxdistill.objective.call import Inputs, sort_call
from fxdistill.objective.head import Head
from fxdistill.objective.make_heads import make_heads
from fxdistill.objective.make_terms import Shapes, asks_for_width, with_projections
from fxdistill.objective.objective import Objective
from fxdistill.objective.term import PAIRS, THRESHOLD

FeatureLoss = str | Callable[..., Tensor]
LossLike = str | Callable[..., Tensor] | None
Plans = Mapping[Tower, Mapping[str, Any] | None]


class Placed(NamedTuple):
    """The models, placed on the mesh if there is one."""

    models: Mapping[Tower, Model]
    ranks: Ranks | None = None
    notes: tuple[str, ...] = ()


class Parts(NamedTuple):
    """The parts of a distiller without its projections and the modules of its heads.

    ``students`` are the models of mutual learning; other distillers have one, the ``main`` model.
    """

    models: Mapping[Tower, Model]
    objective: Objective
    matches: Matches
    settings: Mapping[str, Setting]
    options: Options
    heads: Mapping[str, Head]
    main: Tower = "student"
    students: Sequence[Tower] = ()


@contextlib.contextmanager
def placed(
    models: Mapping[Tower, Model], objective: Objective, mesh: Any, plans: Plans, asked: str
) -> Iterator[Placed]:
    """Put the models on the mesh, if there is one; undo that if the body raises."""
    if mesh is None:
        if any(plan is not None for plan in plans.values()):
            raise OptionError("student_plan and teacher_plan are for models on a mesh: mesh=...")
        yield Placed(models)
        return
    modules = {tower: models[tower].module for tower in plans}
    taps = [(tower, tap) for tower in models for tap in objective.taps_of(tower)]
    frozen = [tower for tower, model in models.items() if not model.trains]
    with (
        parallel.sharding.kept_on_error(*modules.values()),
        buffers_kept_on_error(*modules.values()),
    ):
        found = parallel.setup.set_up(modules, plans, mesh, taps, asked, frozen)
        sharded = {t: replace(model, sharding=found.shardings[t]) for t, model in models.items()}
        yield Placed(sharded, found.ranks, found.notes)


def tried(parts: Parts, examples: Inputs | None) -> Distiller:
    """Make the distiller with its projections and heads, and check it on the examples."""
    problems: list[FxDistillError] = []
    distiller = _made(parts, examples, problems)
    if examples is None:
        raise_together(problems)
        return distiller
    check = functools.partial(distiller.check, *examples.args, **examples.kwargs)
    if problems:  # report the errors of the check together with them
        gather(problems, check)
        raise_together(problems)
    check()
    return distiller


def _made(parts: Parts, examples: Inputs | None, problems: list[FxDistillError]) -> Distiller:
    parts = _with_channels(parts, examples)
    found, wrong = _beside(parts, _shapes(parts, examples))
    if any(isinstance(error, ProjectionError) for error in wrong):
        # Structure does not tell all widths: ask a run on fake tensors, if inputs can be made.
        shown = _dummies(parts) if examples is None else examples
        parts = _with_channels(parts, shown)
        found, wrong = _beside(parts, _dummy_shapes(parts, shown), guess=True)
    problems += wrong
    objective, projections, heads = found
    objective.with_modules(losses := nn.ModuleList())
    modules = [model.module for model in parts.models.values()]
    _make_alike((projections, losses, heads.values()), modules)
    rest = (parts.matches, parts.settings, parts.options, parts.main, parts.students)
    return Distiller(parts.models, objective, projections, heads, *rest)


def _beside(
    parts: Parts, shapes: Shapes, *, guess: bool = False
) -> tuple[tuple[Objective, nn.ModuleList, nn.ModuleDict], list[FxDistillError]]:
    """The projections and the modules of heads, as far as widths are known, and the errors."""
    problems: list[FxDistillError] = []
    modules = {tower: model.module for tower, model in parts.models.items()}
    terms, projections = with_projections(
        parts.objective.features, parts.matches, modules, shapes, problems
    )
    student = modules[parts.main]
    heads = make_heads(parts.objective, parts.heads, student, shapes, problems, guess=guess)
    return (replace(parts.objective, features=terms), projections, heads), problems


def _dummies(parts: Parts) -> Inputs | None:
    """Inputs made for each model; ``None`` where one does not tell what it takes."""
    made = {tower: dummy_inputs(model.module) for tower, model in parts.models.items()}
    if any(inputs is None for inputs in made.values()):
        return None
    return Inputs((), {f"{tower}_inputs": inputs for tower, inputs in made.items()})


def _with_channels(parts: Parts, examples: Inputs | None) -> Parts:
    """The parts, with what the student tells of the values of heads that pool."""
    if examples is None or not channels.asks(parts.objective):
        return parts
    request = _request(parts, examples)
    if dry.is_fake(request):
        return parts
    heads = channels.told(request, Steps())
    return parts._replace(objective=replace(parts.objective, heads=heads))


def _dummy_shapes(parts: Parts, examples: Inputs | None) -> Shapes:
    """The shapes at the taps on inputs made for each model; empty where that cannot be told."""
    if examples is None:
        return {}
    try:
        values = dry.fake_values(_request(parts, examples), Steps())
    except StepError:
        return {}
    except Exception:  # of the models' own code: a capture may go another way
        return _shapes(parts, examples)
    return {end: torch.empty(value.shape, device="meta") for end, value in values.items()}


def _shapes(parts: Parts, examples: Inputs | None) -> Shapes:
    """The shapes at the taps on the examples; empty if no projection needs them."""
    automatic = any(isinstance(head.module, str) for head in parts.heads.values())
    asks = asks_for_width(parts.objective.features, parts.matches) or automatic
    if examples is None or not asks:
        return {}
    # The check that follows reports a step that cannot be captured, with advice.
    with contextlib.suppress(CaptureError):
        return dry.tapped_shapes(_request(parts, examples), Steps())
    return {}


def _request(parts: Parts, examples: Inputs) -> Request:
    """A step of the models without projections."""
    towers, objective = (
        Towers(parts.models, Beside.nothing(), parts.main),
        parts.objective,
    )
    call = sort_call(towers.modules, towers.main, objective.task, *examples)
    check_call(towers, objective, call)
    settings = Settings(parts.settings, objective.names).made(device_of(towers.main_module))
    return Request(towers, objective, call, settings)


def _make_alike(beside: Iterable[Iterable[nn.Module]], models: Iterable[nn.Module]) -> None:
    """Copy the modules beside the models of the mesh's first rank, made at random, to all."""
    found = {p.device_mesh for model in models for p in model.parameters() if is_placed(p)}
    made = [module for modules in beside for module in modules]
    if made and found:
        parallel.setup.make_alike(made, found)


# ---------------------------------------------------------------------- arguments


def as_inputs(examples: Mapping[str, Any] | tuple[Any, ...] | None) -> Inputs | None:
    """``example_inputs`` as the arguments of a call; OptionError for anything else."""
    if examples is None:
        return None
    if not isinstance(examples, (tuple, Mapping)):
        raise OptionError(
            f"example_inputs is a {type(examples).__name__}: a dict of the keywords of a call, or "
            "a tuple of its positional arguments"
        )
    return Inputs(examples, {}) if isinstance(examples, tuple) else Inputs((), dict(examples))


def named_loss(loss: LossLike, table: dict[str, Loss], what: str) -> tuple[Loss, ...]:
    """The loss as a tuple of one; an empty tuple for ``None``, which turns it off."""
    return () if loss is None else (loss_of(loss, table, what),)


def settings_of(
    objective: Objective, heads: Mapping[str, Head] | None, given: tuple[float, ...]
) -> dict[str, Setting]:
    """The settings: the global ones, the weights of matches, and those of the terms of heads."""
    names = ("logit_weight", "feature_weight", "label_weight", "temperature")
    settings: dict[str, Setting] = dict(zip(names, given, strict=True))
    settings |= {term.name: term.weight for term in objective.features if not term.in_pairs}
    if PAIRS in objective.weighed:
        settings[PAIRS] = 1.0
    for term in objective.heads:
        head = (heads or {})[term.name]
        if term.logits is not None:
            settings[term.logits.name] = head.logit_weight
        if term.labels is not None:
            settings[term.labels.name] = head.label_weight
    if (importance := objective.names.importance) is not None and importance.threshold is not None:
        settings[THRESHOLD] = importance.threshold
    check_settings(settings)
    return settings
