"""Which axis of a pooled head's value has its channels: asked of the student, on other inputs.

A linear layer behind a mean over places has to know them, and sizes may agree by chance: a map of
6 channels that is 6 places wide. So the student is run on fake tensors, which compute nothing, with
images of another size, or texts and signals of another length: the channels are the axis that
stays, while the places follow.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple, cast

from torch import Tensor

from fxdistill.distiller import dry, resized
from fxdistill.distiller.modes import Request, Steps
from fxdistill.mapping.projections import Width, structural_widths
from fxdistill.models.axes import ChannelAxis
from fxdistill.models.tap import Tap
from fxdistill.objective.call import Inputs
from fxdistill.objective.objective import Objective
from fxdistill.objective.pooled_head import PooledHead
from fxdistill.objective.term import HeadTerm
from fxdistill.objective.tokens import Batch


def asks(objective: Objective) -> bool:
    """Whether a head that pools leaves open which axis of its value has the channels."""
    return any(_is_open(head) for head in objective.heads)


def told(request: Request, steps: Steps) -> tuple[HeadTerm, ...]:
    """The heads, with the axis of the channels wherever the student tells it.

    A student that cannot be run on other inputs is asked as far as it gets. What is still open
    then, a head settles by the width of its layer.
    """
    heads = request.objective.heads
    if not asks(request.objective):
        return heads
    found = seen(request, steps)
    settled = tuple(
        replace(h, channels=found[h.tap].channels) if _is_open(h) and h.tap in found else h
        for h in heads
    )
    for head in settled:
        if head.pools and head.name in (made := request.towers.beside.heads):
            cast(PooledHead, made[head.name]).channels = head.channels  # it is called alone, too
    return settled


class Axes(NamedTuple):
    """How many axes a value has, and which has its channels, if that is known."""

    number: int
    channels: ChannelAxis | None


def seen(request: Request, steps: Steps) -> dict[Tap, Axes]:
    """The axes of the values of open heads."""
    open_heads = [h for h in request.objective.heads if _is_open(h)]
    alone = tuple(replace(h, logits=None, labels=None) for h in open_heads)
    request = replace(request, objective=replace(request.objective, features=(), heads=alone))
    call, student = request.call, alone[0].student
    given, batch = call.inputs[student], call.batch.of(student)
    before, _ = _values(request, steps, given)
    runs = [
        _values(request, steps, change(given))
        for change in _changes(given, batch, steps.fixed_sizes(request.towers))
    ]
    # What a whole run tells is surer than what one tells that an error has stopped.
    runs.sort(key=lambda run: run[1] is not None)
    values = [values for values, _ in runs]
    width = structural_widths(request.towers.modules[student])
    return {
        h.tap: Axes(
            before[h.tap].ndim,
            _axis(h.tap, before, values, batch)
            or _by_width(before[h.tap], width(h.tap, ()) if h.tap.path else None),
        )
        for h in alone
        if h.tap in before
    }


def _is_open(head: HeadTerm) -> bool:
    return head.pools and head.channels is None


def _values(
    request: Request, steps: Steps, inputs: Inputs
) -> tuple[Mapping[Tap, Tensor], Exception | None]:
    """The values of the student on other inputs, and what has stopped it."""
    student = request.objective.heads[0].student
    inputs_of = {**request.call.inputs, student: inputs}
    shown = replace(request, call=replace(request.call, inputs=inputs_of))
    values, error = dry.values_until_error(shown, steps)
    return {tap: value for (tower, tap), value in values.items() if tower == student}, error


def _changes(
    given: Inputs, batch: Batch, fixed: frozenset[int]
) -> Iterator[Callable[[Inputs], Inputs]]:
    """Ways to make inputs of another size: of images, of a text or sound, or of other numbers."""
    if resized.images(given):
        yield resized.larger
    if resized.texts(given, batch) or resized.sound(given, batch) is not None:
        for pair in (resized.near(batch, fixed), resized.multiples(batch)):
            yield functools.partial(resized.of_length, batch=batch, resize=pair[0])
    yield functools.partial(resized.longer, axis=-1)
    yield functools.partial(resized.longer, axis=1)


def _axis(
    tap: Tap, before: Mapping[Tap, Tensor], runs: list[Mapping[Tap, Tensor]], batch: Batch
) -> ChannelAxis | None:
    """The axis that stays, by the first run that tells; of tokens, the last."""
    if (value := before.get(tap)) is None or value.ndim < 3:
        return None
    for values in runs:
        if (other := values.get(tap)) is not None and (axis := _stays(value, other)) is not None:
            return axis
    tokens = resized.size_of(batch.tokens)
    return -1 if value.ndim == 3 and tokens == tuple(value.shape[:2]) else None


def _by_width(value: Tensor, known: Width | None) -> ChannelAxis | None:
    """The one axis, of 1 and -1, that is as wide as the structure says."""
    if known is None or value.ndim < 3:
        return None
    first, last = (value.shape[axis] == known.size for axis in (1, -1))
    return None if first == last else 1 if first else -1


def _stays(value: Tensor, other: Tensor) -> ChannelAxis | None:
    """Which of axes 1 and -1 stays while the axes beside it follow the inputs."""
    if value.ndim != other.ndim:
        return None
    follows = [a != b for a, b in zip(value.shape, other.shape, strict=True)]
    if follows[1] == follows[-1]:
        # Of videos [B, T, H, W, C] the frames may stay as they are, too.
        return -1 if not follows[-1] and value.ndim > 4 and follows[-2] else None
    return 1 if follows[-1] else -1
