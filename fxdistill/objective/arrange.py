"""Apply the layouts of ``layout.py`` to tensors with einops, and predict the resulting shapes."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import einops
import torch
from torch import Tensor

from fxdistill import base
from fxdistill.base.figures import number, shown
from fxdistill.base.nodes import one_node
from fxdistill.base.tensors import is_placed
from fxdistill.errors import LayoutError
from fxdistill.mapping.layout import (
    Group,
    Layout,
    Step,
    is_number,
    is_size,
    kept,
    parse,
    pooling_step,
)


def _axes(step: Step, shape: Sequence[Any]) -> list[tuple[int, Group]]:
    """Pair each group but the ellipsis with the axis of the value that it describes."""
    where, count = step.ellipsis, len(step.left)
    fits = len(shape) == count if where is None else len(shape) >= count - 1
    if not fits:
        raise LayoutError(
            f"{step.text!r} describes {count} axes, but the value has {len(shape)}: {shown(shape)}"
        )
    return [
        (i if where is None or i < where else i - count + len(shape), group)
        for i, group in enumerate(step.left)
        if i != where
    ]


def _dropped(group: Group) -> tuple[int, int]:
    """The numbers of entries to drop at the beginning and at the end of an axis."""
    if len(group) == 1:
        return 0, 0
    keep = next(i for i, term in enumerate(group) if not is_number(term))
    numbers = [0 if i == keep else int(term[0]) for i, term in enumerate(group)]
    return sum(numbers[:keep]), sum(numbers[keep:])


def sizes(layout: Layout, shape: Sequence[Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes, by name, of the axes in ``layout``'s first pattern that ``shape`` determines.

    ``known`` gives sizes of further names, and they are returned too. A group of several names
    determines the one that is left open.
    """
    found = dict(known)
    if not layout:
        return found
    step = parse(*layout[0])
    for axis, group in _axes(step, shape):
        term, total = kept(group), shape[axis] - sum(_dropped(group))
        given, open_names = 1, []
        for name in term:
            if name.isdigit():
                given = given * int(name)
            elif name in found and len(term) > 1:
                given = given * found[name]
            else:
                open_names.append(name)
        if len(open_names) == 1:
            found[open_names[0]] = total // given
    return found


def _require_fit(step: Step, shape: Sequence[Any], lengths: Mapping[str, Any]) -> None:
    for axis, group in _axes(step, shape):
        term, total = kept(group), shape[axis] - sum(_dropped(group))
        if total < 1:
            raise LayoutError(
                f"{step.text!r} drops {sum(_dropped(group))} of the {number(shape[axis])} entries "
                f"of axis {axis} of {shown(shape)}: none is left"
            )
        if unknown := [n for n in term if not n.isdigit() and n not in lengths]:
            raise LayoutError(
                f"{step.text!r}: axis {axis} of {shown(shape)} is {number(total)} = "
                f"{' × '.join(term)}, and nothing says how large {' and '.join(unknown)} are. "
                "Use the same names in the other side's pattern, where they are axes of their own, "
                "or write numbers."
            )
        product = 1
        for name in term:
            product = product * (int(name) if name.isdigit() else lengths[name])
        if product != total:
            named = ", ".join(f"{n} = {number(lengths[n])}" for n in term if not n.isdigit())
            raise LayoutError(
                f"{step.text!r}: axis {axis} of {shown(shape)} has {number(total)} entries, which "
                f"is not {' × '.join(term)} with {named}"
            )


def _run(x: Tensor, layout: Layout, known: Mapping[str, Any]) -> Tensor:
    for pattern, reduction in layout:
        step = parse(pattern, reduction)
        lengths = sizes(((pattern, reduction),), x.shape, known)
        _require_fit(step, x.shape, lengths)
        for axis, group in _axes(step, x.shape):
            before, after = _dropped(group)
            if before or after:
                x = x.narrow(axis, before, x.shape[axis] - before - after)
        left, given = _for_einops(step, lengths)
        if step.reduction is None:
            x = einops.rearrange(x, f"{left} -> {step.right}", **given)
        else:
            x = einops.reduce(x, f"{left} -> {step.right}", step.reduction, **given)
    return x


def _for_einops(step: Step, lengths: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The left side, with a name in place of each number, and the lengths that einops needs."""
    parts = []
    given: dict[str, Any] = {}
    for axis, term in enumerate(step.kept):
        names = [f"n{axis}x{i}" if is_size(name) else name for i, name in enumerate(term)]
        if len(names) > 1:
            given.update((n, int(name)) for n, name in zip(names, term, strict=True) if n != name)
            given.update((n, lengths[n]) for n in names[1:] if n in lengths)
        single = len(names) == 1 and names[0] != "1"
        parts.append(names[0] if single else f"({' '.join(names)})")
    return " ".join(parts), given


@one_node
def arrange(
    value: Tensor, own: Layout, other: Tensor, others: Layout, weights: Tensor | None = None
) -> Tensor:
    """Apply ``value``'s ``own`` layout; ``other`` and its layout give the sizes it leaves open.

    With ``weights`` ``[B, L]`` for a value ``[B, L, ...]``, the step that reduces the tokens weighs
    each of them; a token with weight 0, such as padding, does not count.
    """
    theirs = sizes(others, other.shape, {})
    at = None if weights is None else pooling_step(own)
    if weights is None or at is None:
        return _run(value, own, theirs)
    if is_placed(value):
        weights = cast(Tensor, base.placement.everywhere(weights, value))
    w = weights.reshape(*weights.shape, *(1,) * (value.ndim - 2)).expand_as(value).to(value.dtype)
    value, w = _run(value, own[:at], theirs), _run(w, own[:at], theirs)
    return _run(_pooled(value, w, *own[at], theirs), own[at + 1 :], theirs)


def _pooled(
    value: Tensor, w: Tensor, pattern: str, reduction: str, known: Mapping[str, Any]
) -> Tensor:
    if reduction == "max":
        lowest = torch.finfo(value.dtype).min
        pooled = _run(torch.where(w != 0, value, lowest), ((pattern, "max"),), known)
        return torch.where(pooled == lowest, torch.zeros_like(pooled), pooled)
    pooled = _run(torch.where(w != 0, value * w, 0), ((pattern, "sum"),), known)
    if reduction == "sum":
        return pooled
    total = _run(w, ((pattern, "sum"),), known)
    return pooled / torch.where(total == 0, torch.ones_like(total), total)


def arranged_shape(value: Tensor, own: Layout, other: Tensor, others: Layout) -> tuple[int, ...]:
    """The shape that ``arrange`` returns; raises LayoutError where the patterns do not fit."""
    if not own:
        return tuple(value.shape)
    theirs = sizes(others, other.shape, {})
    like = torch.empty(value.shape, dtype=value.dtype, device="meta")
    return tuple(_run(like, own, theirs).shape)
