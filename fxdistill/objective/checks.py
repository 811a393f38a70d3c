"""Check all matches at once, when the shapes of their values are known.

A captured step does so while it is traced, an eager one between the models and the first loss: in
both cases before the student changes. All errors are raised together.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxdistill.base.attention import each, of_queries, tensors_of
from fxdistill.base.autocast import autocast_dtype
from fxdistill.base.figures import number, shown
from fxdistill.base.tensors import is_placed
from fxdistill.errors import (
    DeviceError,
    DtypeError,
    FrozenStudentError,
    FxDistillError,
    LayoutError,
    MeshError,
    PortError,
    ProjectionError,
    ShapeError,
    raise_together,
)
from fxdistill.losses.names import Compared, loss_name, needs_queries
from fxdistill.mapping.layout import axes_after
from fxdistill.models.tap import ATTENTION, Tap, Tower
from fxdistill.models.weights import weight_of
from fxdistill.objective.arrange import arranged_shape
from fxdistill.objective.channels_first import AXES, are_first, tokens_first
from fxdistill.objective.term import Term
from fxdistill.objective.tokens import Batch
from fxdistill.objective.unweighed import unweighed
from fxdistill.taps.attention import value_of
from fxdistill.taps.table import TapTable, not_executed


def verify(
    terms: Sequence[Term],
    projections: nn.ModuleList,
    table: TapTable,
    *,
    alone: bool,
    on_ranks: bool = False,
    others: Sequence[tuple[Tower, Tap]] = (),
    batch: Batch | None = None,
) -> None:
    """Check every match against the values in ``table``; add warnings to it, raise errors.

    ``batch`` is the step's, of which only shapes are read.
    ``others`` are further values that must be there, those of heads.
    ``alone`` says that only the matches could train anything: there is no other term and no
    projection. ``on_ranks`` says that other ranks have samples, too.
    """
    problems: list[FxDistillError] = []
    frozen: list[Term] = []
    for tower, tap in others:
        if value_of(table, tower, tap) is None:
            known = table.problems.get((tower, tap.path, tap.port))
            problems.append(known or not_executed(table, tower, tap))
    for term in terms:
        found = [value_of(table, *end) for end in term.taps]
        missing = [
            table.problems.get((tower, tap.path, tap.port)) or not_executed(table, tower, tap)
            for (tower, tap), value in zip(term.taps, found, strict=True)
            if value is None
        ]
        if missing:
            problems += missing
            continue
        learns = any(x.requires_grad for x in tensors_of(found[0]))
        if term.of_attention:
            problems += _of_attention(term, *found)
            found = [of_queries(value) for value in found if value is not None]
        student, teacher = (value for value in found if isinstance(value, Tensor))
        for (tower, tap), value in zip(term.taps, (student, teacher), strict=True):
            problems += _parts(table, tower, tap, value)
        problems += _kinds(term, student, teacher)
        problems += _meshes(term, student, teacher)
        if not term.of_attention:
            problems += _shapes(term, student, teacher, projections)
            table.axes[term.name] = axes_after(term.layouts[0], student.ndim)
        table.warnings += [] if on_ranks else _too_few(term, student)
        text = "" if problems or batch is None else unweighed(term, student, teacher, batch)
        table.unweighed |= {term.name: text} if text else {}
        if torch.is_grad_enabled() and not learns:
            frozen.append(term)
            ours, theirs = _named(term)
            table.warnings.append(
                f"{ours} depends on no trainable parameter: its match with "
                f"{theirs} teaches nothing. Unfreeze something before it, or drop the match."
            )
    if alone and frozen and not problems and len(frozen) == len(terms):
        problems.append(
            FrozenStudentError(
                "no term depends on a trainable parameter: there are only matches of frozen "
                f"values ({', '.join(term.name for term in frozen)}). Unfreeze what should learn."
            )
        )
    raise_together(problems)


_LEAST = {"distance_wise": 2, "angle_wise": 3}  # samples that have a relation


def _too_few(term: Term, student: Tensor) -> list[str]:
    """A warning where there are too few samples to compare with each other."""
    least, count = _LEAST.get(term.kind.name, 0), student.shape[0]
    if count >= least or not term.kind.named:
        return []
    return [
        f"{term.name}: {term.kind.name} compares at least {least} samples with each other, and the "
        f"batch has {number(count)}: the term is 0 and teaches nothing"
    ]


def _named(term: Term) -> tuple[str, str]:
    """Both values as messages name them: the model and its tap."""
    ours, theirs = (f"{tower} {str(tap)!r}" for tower, tap in term.taps)
    return ours, theirs


def _of_attention(term: Term, student: Any, teacher: Any) -> list[FxDistillError]:
    """The error that a loss of attention raises on tensors of these shapes."""
    if not term.kind.named or student is None or teacher is None:
        return []
    if needs_queries(term.loss):
        made = [
            PortError(
                f"{tower} {str(tap)!r} is a map that the model makes itself: it has no queries and "
                f"no scores, which {loss_name(term.loss)} needs. Load the model with "
                "attn_implementation='sdpa', or take another loss."
            )
            for (tower, tap), value in zip(term.taps, (student, teacher), strict=True)
            if tap.port == ATTENTION and isinstance(value, Tensor)
        ]
        if made:
            return [*made]
    try:
        with torch.no_grad():
            term.loss(*(each(_like, x) for x in (student, teacher)))
    except FxDistillError as error:
        ours, theirs = _named(term)
        return [type(error)(f"{ours} and {theirs}: {error}")]
    return []


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def _parts(table: TapTable, tower: Tower, tap: Tap, value: Tensor) -> list[FxDistillError]:
    """The error for a plain tensor that looks like one rank's shard of the sequence.

    Comparing such shards would compare different tokens.
    """
    if is_placed(value) or value.ndim < 3:
        return []
    ranks = table.expected.ranks.get(tower, frozenset())
    sharded = [
        length
        for batch, length in table.expected.grids
        for size in ranks
        if value.shape[0] == batch and value.shape[1] == -(-length // size) != length
    ]
    if not sharded or tuple(value.shape[:2]) in table.expected.grids:
        return []
    return [
        MeshError(
            f"{tower} {str(tap)!r} is a plain tensor {shown(value.shape)}: this rank's part, as it "
            f"seems, of a sequence of {sharded[0]}. Give the parallel styles around it "
            "use_local_output=False, so that it says where it belongs, or match a module whose "
            "style does."
        )
    ]


def _meshes(term: Term, student: Tensor, teacher: Tensor) -> list[FxDistillError]:
    """The error for two values on different meshes."""
    if not is_placed(student) or not is_placed(teacher):
        return []
    if student.device_mesh == teacher.device_mesh:
        return []
    ours, theirs = _named(term)
    return [
        MeshError(
            f"{ours} lies on {student.device_mesh}, {theirs} on {teacher.device_mesh}: "
            "parallelize both models on one mesh."
        )
    ]


def _kinds(term: Term, student: Tensor, teacher: Tensor) -> list[FxDistillError]:
    problems: list[FxDistillError] = [
        DtypeError(
            f"{tower} {str(tap)!r} is {value.dtype}, and a loss compares real numbers: map a "
            "value of floating point, or name another port."
        )
        for (tower, tap), value in zip(term.taps, (student, teacher), strict=True)
        if not value.dtype.is_floating_point
    ]
    if student.device != teacher.device:
        ours, theirs = _named(term)
        problems.append(
            DeviceError(
                f"{ours} is on {student.device}, {theirs} on {teacher.device}: matched values must "
                "be on one device."
            )
        )
    return problems


def _shapes(
    term: Term, student: Tensor, teacher: Tensor, projections: nn.ModuleList
) -> list[FxDistillError]:
    s_name, t_name = str(term.student), str(term.teacher)
    ours, theirs = term.layouts
    try:
        s: Sequence[int] = arranged_shape(student, ours, teacher, theirs)
        t: Sequence[int] = arranged_shape(teacher, theirs, student, ours)
    except LayoutError as error:
        return [LayoutError(f"{' and '.join(_named(term))}: {error}")]
    if term.compares == "anything":
        return []
    if term.projection is not None:
        projection = projections[term.projection]
        if (wrong := _dtype_problem(s_name, student, projection)) is not None:
            return [wrong]
        if term.channels_first[0] and len(s) == AXES and isinstance(projection, nn.Linear):
            return [_no_convolution(s_name, s, projection)]
        projected = projected_shape(s, projection, f"{s_name!r} -> {t_name!r}")
        if isinstance(projected, ProjectionError):
            return [projected]
        if projected is None:  # a user's module: the step checks the shape that it returns
            return []
        s = projected
    try:
        first = are_first(term.channels_first, s, t)
    except LayoutError as error:
        return [LayoutError(f"{' and '.join(_named(term))}: {error}")]
    if all(first) and term.compares == "shapes" and (s[0], s[2]) == (t[0], t[2]) and s[1] != t[1]:
        return [_other_channels(s_name, s, t_name, t)]
    s, t = tokens_first(s, first[0]), tokens_first(t, first[1])
    problem = comparison_problem(s, t, term.compares, s_name, t_name, loss_name(term.loss))
    return [] if problem is None else [problem]


def _no_convolution(name: str, shape: Sequence[int], made: nn.Linear) -> ProjectionError:
    """The error for a norm's value ``[B, C, L]`` that was taken for ``[B, C]``."""
    return ProjectionError(
        f"the projection of {name!r} was made for a value [B, C], and it is {shown(shape)}, "
        "[B, C, L]: give wrap(..., example_inputs={...}), from which that is read, or "
        f"project=nn.Conv1d({made.in_features}, {made.out_features}, 1)"
    )


def _other_channels(s_name: str, s: Sequence[int], t_name: str, t: Sequence[int]) -> ShapeError:
    """The error for two values ``[B, C, L]`` of other channels."""
    return ShapeError(
        f"student {s_name!r} is {shown(s)} and teacher {t_name!r} is {shown(t)}, [B, C, L]: a loss "
        "needs equal shapes; project the student: Match(..., project='auto' or "
        f"nn.Conv1d({s[1]}, {t[1]}, 1))."
    )


def _dtype_problem(name: str, value: Tensor, projection: nn.Module) -> DtypeError | None:
    first = next(projection.parameters(), None)
    casts = autocast_dtype(value.device.type) is not None
    if first is None or first.dtype == value.dtype or casts:
        return None
    return DtypeError(
        f"the projection of {name!r} is {first.dtype}, and the student's value {value.dtype}: "
        f"project=...to({value.dtype}), or let project='auto' make it."
    )


def projected_shape(
    shape: Sequence[int], projection: nn.Module, name: str
) -> Sequence[int] | ProjectionError | None:
    """The output shape of a linear layer or 1×1 convolution; ``None`` for any other module.

    A ProjectionError is returned, not raised, where ``shape`` does not fit the layer.
    """
    weight = weight_of(projection, "")
    if weight is None or weight.kind != "linear":
        return None
    axis = 1 if isinstance(projection, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else len(shape) - 1
    if shape[axis] != weight.fan_in:
        shape = shown(shape)
        return ProjectionError(
            f"the projection of {name} takes {weight.fan_in} features, and axis {axis} of the "
            f"student's value {shape} has {shape[axis]}: make it {type(projection).__name__}"
            f"({shape[axis]}, {weight.fan_out}, ...), or let project='auto' make it."
        )
    return (*shape[:axis], weight.fan_out, *shape[axis + 1 :])


def comparison_problem(
    student: Sequence[int],
    teacher: Sequence[int],
    compares: Compared,
    s_name: str,
    t_name: str,
    loss: str,
) -> ShapeError | None:
    """The error for two values that a match's loss cannot compare; ``None`` if it can."""
    s, t = list(student), list(teacher)
    if compares == "shapes":
        return shape_problem(s, t, s_name, t_name)
    what = ""
    if compares == "samples" and s[:1] != t[:1]:
        what = "the same samples of both models, which are the first axis."
    if compares == "places" and not _same_places(s, t):
        what = (
            "the same places of both models (of maps [B, C, *places] or tokens [B, L, D]). Bring "
            "them to the same: Match(..., reduce=(pattern, 'mean'))."
        )
    if not what:
        return None
    return ShapeError(
        f"student {s_name!r} is {shown(s)} and teacher {t_name!r} is {shown(t)}: {loss} compares "
        f"{what}"
    )


def _same_places(s: list[int], t: list[int]) -> bool:
    """Whether two shapes agree in all axes but the width: axis 1 of a map, the last of tokens."""
    as_map = len(s) > 3 and s[:1] == t[:1] and s[2:] == t[2:]
    return len(s) == len(t) and (as_map or s[:-1] == t[:-1])


def shape_problem(
    student: Sequence[int], teacher: Sequence[int], s_name: str, t_name: str
) -> ShapeError | None:
    """The error, with advice, for two values of different shapes; ``None`` for equal shapes."""
    s, t = list(student), list(teacher)
    if s == t:
        return None
    s, t = shown(s), shown(t)
    if len(s) != len(t):
        advice = "bring them to the same axes: Match(..., rearrange=(...), reduce=(...))"
    elif s[:-1] == t[:-1]:
        advice = f"project the student: Match(..., project='auto' or nn.Linear({s[-1]}, {t[-1]}))"
    elif len(s) == 4 and s[2:] == t[2:] and s[0] == t[0]:
        advice = f"project the student: Match(..., project='auto' or nn.Conv2d({s[1]}, {t[1]}, 1))"
    else:
        advice = "map values of one shape, or reduce both: Match(..., reduce=(...))"
    return ShapeError(
        f"student {s_name!r} is {s} and teacher {t_name!r} is {t}: a loss needs equal shapes; "
        f"{advice}."
    )
