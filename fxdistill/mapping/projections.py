"""Projections: layers that map a student's value to the teacher's width.

The distiller owns them and trains them with the student; exporting the student leaves them out. A
linear layer acts on the last axis, a 1×1 convolution on feature maps ``[B, C, *places]``. torch
initialises both: weights and biases uniform in ±1/√(student's width).
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from fxdistill.errors import OptionError, ProjectionError
from fxdistill.mapping.layout import Layout, width_after
from fxdistill.mapping.match import Match
from fxdistill.models.landmarks import embedding_of
from fxdistill.models.structure import TOKEN_MLP, Block, stacks_of
from fxdistill.models.tap import Tap
from fxdistill.models.weights import convolved_axes, output_width, weight_of, weights_in

KINDS = ("auto", "linear")


@dataclass(frozen=True)
class Width:
    """A value's width; it is the second axis of a feature map, or the last axis of other values.

    ``places`` are the axes behind it in a map: 1 of ``[B, C, L]``, 2 of ``[B, C, H, W]``, or 3.
    """

    size: int
    places: int = 0

    @property
    def is_map(self) -> bool:
        """Whether the width is the second axis."""
        return self.places > 0


def check_option(match: Match, student: nn.Module) -> None:
    """Raise OptionError for an unknown ``project``, or one that shares the student's parameters."""
    if isinstance(match.project, nn.Module):
        own = {id(p) for p in student.parameters()}
        if any(id(p) in own for p in match.project.parameters()):
            raise OptionError(
                f"the projection of {match.student!r} is a part of the student: give it a module "
                "of its own, such as a copy"
            )
    if match.project is None or isinstance(match.project, nn.Module) or match.project in KINDS:
        return
    raise OptionError(
        f"project={match.project!r} for {match.student!r}: None (the shapes must agree), 'linear', "
        "'auto' (a linear only where the widths differ), or an nn.Module"
    )


def made(
    match: Match, student: Width | None, teacher: Width | None, like: nn.Module
) -> nn.Module | None:
    """Make the projection of a match from the two widths, on the device of ``like``.

    Returns ``None`` where "auto" finds equal widths. Raises ProjectionError where a width is
    unknown.
    """
    if student is None or teacher is None:
        unknown = " and ".join(
            f"{tower} {path!r}"
            for tower, path, width in (
                ("student", match.student, student),
                ("teacher", match.teacher, teacher),
            )
            if width is None
        )
        raise ProjectionError(
            f"project={match.project!r} for {match.student!r}: the width of {unknown} cannot be "
            "told from the model's structure. Give wrap(..., example_inputs={...}), from which it "
            "is read, or the module itself: project=nn.Linear(student width, teacher width)."
        )
    if match.project == "auto" and student.size == teacher.size:
        return None
    first = next(like.parameters(), None)
    device, dtype = (None, None) if first is None else (first.device, first.dtype)
    # Create it on the device: moving it would reassign its parameters, which fake tensors refuse.
    if student.is_map:
        convolution = _CONVOLUTIONS[student.places]
        return convolution(student.size, teacher.size, 1, device=device, dtype=dtype)
    return nn.Linear(student.size, teacher.size, device=device, dtype=dtype)


_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def widths_by_shape(
    student: Sequence[int],
    teacher: Sequence[int],
    channels_last: bool,
    channels_first: tuple[bool, bool] = (False, False),
) -> tuple[Width, Width]:
    """The widths of a student and a teacher value, from their shapes.

    Values of four or five axes are taken for feature maps ``[B, C, *places]``, unless their shapes
    agree in all axes but the last. Where they agree in all axes, ``channels_last`` decides. One of
    three axes is a map ``[B, C, L]`` where ``channels_first`` knows it.
    """
    s, t = list(student), list(teacher)
    last = s[:-1] == t[:-1] and (s[-1] != t[-1] or channels_last)
    maps = len(s) in _MAP_AXES and not last
    found = [
        Width(shape[1], len(shape) - 2)
        if (maps and len(shape) in _MAP_AXES) or (first and len(shape) == 3)
        else Width(shape[-1])
        for shape, first in zip((s, t), channels_first, strict=True)
    ]
    return found[0], found[1]


_MAP_AXES = (4, 5)


def _changed_behind(model: nn.Module, path: str, block: Block) -> bool:
    """Whether the module at ``path``, which holds ``block``, has layers of another width behind it.

    So do the stages of Swin, which end in a layer that halves the places and doubles the width.
    """
    outer = model.get_submodule(path)
    if path == block.path or isinstance(outer, (nn.ModuleList, nn.ModuleDict)):
        return False
    inside = block.path.removeprefix(f"{path}.").split(".")[0]
    children = list(outer.named_children())
    at = [name for name, _ in children].index(inside)
    behind = [w for name, child in children[at + 1 :] for w in weights_in(child, name)]
    return bool(behind) and behind[-1].fan_out != block.width


def structural_widths(model: nn.Module) -> Callable[[Tap, Layout], Width | None]:
    """A function that reads widths off a model's structure; it returns ``None`` if it cannot.

    The model is not run.
    """
    stacks = stacks_of(model)
    known: dict[str, Width] = {}
    for block in (block for stack in stacks for block in stack.blocks):
        if block.width is not None:
            # A module around the blocks (a stage, an encoder) returns what its last block returns,
            # unless layers behind them make another width of it.
            outer = itertools.accumulate(block.path.split("."), lambda a, b: f"{a}.{b}")
            places = 2 if block.is_map else 0
            same = (path for path in outer if not _changed_behind(model, path, block))
            known.update((path, Width(block.width, places)) for path in same)
            for part in block.parts:
                of_part = 1 if part.kind == TOKEN_MLP else 0  # [B, C, L]
                of_part = places if part.kind == "convolution" else of_part
                known[part.path] = Width(block.width, of_part)

    first = stacks[0].blocks[0] if stacks else None
    embedding = embedding_of(model, stacks)
    if embedding is not None and first is not None and first.width_in is not None:
        known.setdefault(embedding, Width(first.width_in, 2 if first.is_map else 0))

    def width(tap: Tap, layout: Layout) -> Width | None:
        module = model.get_submodule(tap.path)
        if tap.port == "output":
            leaf = output_width(module)
            found = Width(*leaf) if leaf is not None else known.get(tap.path)
        elif tap.port == "input" and (weight := weight_of(module, "")) is not None:
            found = Width(weight.fan_in, convolved_axes(module))
        else:
            found = None
        if found is None or not layout:
            return found
        after = width_after(layout, found.size, found.places)
        return None if after is None else Width(*after)

    return width
