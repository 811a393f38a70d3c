"""Layouts: einops patterns that make a student value and a teacher value comparable.

Layouts add one thing to einops: with ``+``, a group on the left side names entries to drop, such as
the class token in ``"b (1 + h w) c -> b c h w"`` or two registers at the end in
``"b (n + 2) c -> b n c"``. They also add one convenience: where a value does not determine an axis
of its own pattern (``h`` above), the axis of that name in the other model's pattern gives its size.
einops does all the work on tensors.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from fxdistill.errors import LayoutError, OptionError

REDUCTIONS = ("mean", "max", "sum")
_TOKEN = re.compile(r"\.\.\.|[A-Za-z_]\w*|\d+|[()+]|\S")
Group = tuple[tuple[str, ...], ...]  # the terms of a sum, each a product of names and numbers


@dataclass(frozen=True)
class Step:
    """One pattern. ``left`` holds the value's axes; einops sees them after sums have been cut."""

    text: str
    left: tuple[Group, ...]
    right: str
    reduction: str | None = None

    @property
    def ellipsis(self) -> int | None:
        """The index of ``...`` on the left side; ``None`` if there is none."""
        return next((i for i, group in enumerate(self.left) if group == (("...",),)), None)

    @property
    def kept(self) -> list[tuple[str, ...]]:
        """The left side without the terms that name entries to drop."""
        return [kept(group) for group in self.left]


def kept(group: Group) -> tuple[str, ...]:
    """The term of a sum that is not dropped."""
    return group[0] if len(group) == 1 else next(t for t in group if not is_number(t))


def is_size(name: str) -> bool:
    """Whether an axis is written as a number that einops refuses: any number but 1."""
    return name.isdigit() and name != "1"


def is_number(term: tuple[str, ...]) -> bool:
    """Whether a term of a sum is the number of entries to drop."""
    return len(term) == 1 and term[0].isdigit()


# (pattern, reduction or "") in order. Plain tuples, because a graph node carries them as arguments.
Layout = tuple[tuple[str, str], ...]


def layouts(rearrange: Any, reduce: Any, where: str) -> tuple[Layout, Layout]:
    """The student's and the teacher's layout, from a match's options.

    Raises OptionError or LayoutError where an option is not a layout.
    """
    sides: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    for side, pattern in zip(sides, _pair(rearrange, isinstance(rearrange, str)), strict=True):
        if pattern is not None:
            side.append((pattern, ""))
    single = isinstance(reduce, (tuple, list)) and len(reduce) == 2 and reduce[1] in REDUCTIONS
    for side, entry in zip(sides, _pair(reduce, single), strict=True):
        if entry is not None:
            pair = isinstance(entry, (tuple, list)) and len(entry) == 2
            if not pair or entry[1] not in REDUCTIONS:
                raise OptionError(
                    f"reduce={reduce!r} for {where!r}: (pattern, 'mean' | 'max' | 'sum'), or a "
                    "pair of such for student and teacher, either of which may be None"
                )
            side.append((entry[0], entry[1]))
    for pattern, reduction in (*sides[0], *sides[1]):
        parse(pattern, reduction)
    return tuple(sides[0]), tuple(sides[1])


def _pair(value: Any, single: bool) -> tuple[Any, Any]:
    if value is None or single:
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return value[0], value[1]
    raise OptionError(
        f"{value!r} is no layout: a pattern such as 'b c h w -> b (h w) c' for both sides, or a "
        "pair (student's, teacher's), either of which may be None"
    )


@cache
def parse(pattern: str, reduction: str = "") -> Step:
    """Parse a pattern; raises LayoutError, which explains the mistake, where it is not one."""
    if not isinstance(pattern, str) or pattern.count("->") != 1:
        raise LayoutError(
            f"{pattern!r} is no einops pattern: 'axes -> axes', as in 'b c h w -> b (h w) c'"
        )
    left, right = (part.strip() for part in pattern.split("->"))
    groups = _groups(left, pattern)
    for group in groups:
        if len(group) > 1 and sum(not is_number(term) for term in group) != 1:
            raise LayoutError(
                f"{pattern!r}: in a sum all but one term are numbers of entries to drop, as in "
                "(1 + h w)"
            )
    if "+" in right:
        raise LayoutError(f"{pattern!r}: a sum, which drops entries, can only stand on the left")
    _check_right(right, left, pattern)
    step = Step(pattern, tuple(groups), right, reduction or None)
    names = [name for term in step.kept for name in term if not name.isdigit() and name != "..."]
    wanted = [token for token in _TOKEN.findall(right) if token[0].isalpha() or token[0] == "_"]
    if twice := {name for name in names if names.count(name) > 1}:
        raise LayoutError(f"{pattern!r} names {', '.join(sorted(twice))} twice on the left")
    if unknown := [name for name in wanted if name not in names]:
        raise LayoutError(
            f"{pattern!r}: {', '.join(unknown)} on the right is not on the left: a layout "
            "makes no new axes."
        )
    if numbers := [token for token in _TOKEN.findall(right) if is_size(token)]:
        raise LayoutError(
            f"{pattern!r}: {', '.join(numbers)} on the right, where only 1 can stand: name "
            "the axis."
        )
    lost = [name for name in names if name not in wanted]
    lost += [name for term in step.kept for name in term if is_size(name)]
    if lost and not reduction:
        raise LayoutError(
            f"{pattern!r} loses the axis {', '.join(lost)}: keep it on the right, or say what "
            f"becomes of it: reduce=({pattern!r}, 'mean')"
        )
    return step


def _check_right(right: str, left: str, pattern: str) -> None:
    """Raise now for a right side that einops would refuse only at the first training step."""
    names = [n for group in _groups(right, pattern, "right") for term in group for n in term]
    if twice := {name for name in names if names.count(name) > 1 and name != "1"}:
        raise LayoutError(f"{pattern!r} names {', '.join(sorted(twice))} twice on the right")
    if ("..." in names) != ("..." in left):
        raise LayoutError(f"{pattern!r}: ... stands on both sides or on none")
    for name in _TOKEN.findall(f"{left} {right}"):
        if name.startswith("_") or name.endswith("_"):
            raise LayoutError(f"{pattern!r}: {name} begins or ends with _, which no axis may")


def _groups(left: str, pattern: str, side: str = "left") -> list[Group]:
    groups: list[Group] = []
    terms: list[list[str]] | None = None
    for token in _TOKEN.findall(left):
        if token == "(" and terms is None:
            terms = [[]]
        elif token == ")" and terms is not None:
            groups.append(tuple(tuple(term) for term in terms))
            terms = None
        elif token == "+" and terms is not None and terms[-1]:
            terms.append([])
        elif token == "..." or token[0].isalnum() or token[0] == "_":
            if terms is None:
                groups.append(((token,),))
            else:
                terms[-1].append(token)
        else:
            raise LayoutError(f"{pattern!r}: unexpected {token!r} on the {side}")
    if terms is not None or any(not term for group in groups for term in group):
        raise LayoutError(f"{pattern!r}: a parenthesis is not closed, or holds nothing")
    return groups


def pooling_step(layout: Layout) -> int | None:
    """The index of the step that reduces the token axis of ``[B, L, ...]``; ``None`` if none does.

    Also ``None`` where a pattern merges or splits that axis.
    """
    axis = 1
    for number, (pattern, reduction) in enumerate(layout):
        step = parse(pattern, reduction)
        if len(step.left) <= axis or step.ellipsis is not None or len(step.left[axis]) > 1:
            return None
        name = step.left[axis]
        right = _groups(step.right, pattern)
        if name in right:
            axis = right.index(name)
        elif any(part in _TOKEN.findall(step.right) for part in name[0]):
            return None
        else:
            return number
    return None


def pools_tokens(layout: Layout) -> bool:
    """Whether a step reduces the token axis."""
    return pooling_step(layout) is not None


def keeps_samples(layout: Layout) -> bool:
    """Whether the first axis, the samples, is the first one behind the layout too."""
    for pattern, reduction in layout:
        step = parse(pattern, reduction)
        right = _groups(step.right, pattern)
        if not step.left or not right or step.left[0] == (("...",),) or step.left[0] != right[0]:
            return False
    return True


def keeps_tokens(layout: Layout, axis: int = 1) -> bool:
    """Whether the layout returns tokens in their order: ``[B, L, ...]`` or ``[B·L, ...]``.

    ``axis`` is the token axis of the value before the layout.
    """
    for pattern, reduction in layout:
        step = parse(pattern, reduction)
        groups = (step.left[0], *step.left[axis : axis + 1])
        axis = 1
        lead = [group[0] for group in groups if len(group) == 1 and len(group[0]) == 1]
        right = _TOKEN.findall(step.right)
        names = [term[0] for term in lead]
        kept = right[:2] == names or right[:4] == ["(", *names, ")"]
        if len(names) < 2 or not kept:
            return False
    return axis == 1


def leaves_numbers(layout: Layout, axis: int = 1) -> bool:
    """Whether the layout makes one number of each token of ``[B, L, D]``: ``[B, L]`` or ``[B·L]``.

    ``axis`` is as in ``keeps_tokens``. A map ``[B, C, H, W]`` has no tokens that could be kept.
    """
    if not layout or not keeps_tokens(layout, axis):
        return False
    steps = [parse(pattern, reduction) for pattern, reduction in layout]
    names = [token for token in _TOKEN.findall(steps[-1].right) if token not in "()"]
    merged = steps[-1].right.startswith("(")
    whole = any(len(step.left) == 3 for step in steps) and len(names) == 2
    return whole and (not merged or len(_groups(steps[-1].right, steps[-1].text)) == 1)


def axes_after(layout: Layout, axes: int) -> int:
    """How many axes a value of ``axes`` axes has behind the layout."""
    for pattern, reduction in layout:
        step = parse(pattern, reduction)
        right = len(_groups(step.right, pattern))
        axes = right if step.ellipsis is None else axes - len(step.left) + right
    return axes


def width_after(layout: Layout, size: int, places: int) -> tuple[int, int] | None:
    """The width after a layout, and the axes of the map's places; ``None`` if it is lost.

    The width is the second axis of a feature map ``[B, C, H, W]`` or ``[B, C, T, H, W]``, and the
    last axis of any other value, which has no ``places``. As second of three axes it is lost: a
    pattern that ends in ``b c l`` makes ``l`` the width.
    """
    for pattern, reduction in layout:
        step = parse(pattern, reduction)
        if step.ellipsis is not None and places:
            return None
        group = step.left[1 if places else -1]
        if group == (("...",),) or len(group) != 1 or len(group[0]) != 1:
            return None
        (right,) = [_groups(step.right, pattern)]
        found = [i for i, g in enumerate(right) if g == group]
        if len(found) != 1:
            return None
        places = len(right) - 2 if len(right) in (4, 5) and found[0] == 1 else 0
        if not places and found[0] != len(right) - 1:
            return None
    return size, places
