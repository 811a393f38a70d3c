"""Which axis of matched maps has their channels: asked of the models, on larger images.

The channels are the axis that stays where an image is twice the size.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from torch import Tensor

from fxdistill.distiller import dry, resized
from fxdistill.distiller.asking import End, said
from fxdistill.distiller.modes import Request, Steps
from fxdistill.models.axes import places_of_convolutions
from fxdistill.objective.call import Call, Inputs
from fxdistill.objective.objective import Objective
from fxdistill.objective.term import Term

_OF_CHANNELS = frozenset(("l2", "cosine", "fitnet", "attention_transfer", "fpn"))


def _reads_channels(term: Term) -> bool:
    """Whether the loss tells channels from places; a layout says what the axes are."""
    if not term.kind.named or term.of_attention or term.is_map or any(term.layouts):
        return False
    among = term.kind.name in _OF_CHANNELS or term.kind.sees == "samples together"
    return among or term.weights is not None


def asks(objective: Objective, call: Call) -> bool:
    """Whether a loss tells the channels of a value from its places, and images are read."""
    reads = any(_reads_channels(term) for term in objective.features)
    return reads and any(resized.images(inputs) for inputs in call.inputs.values())


def with_channels(
    terms: tuple[Term, ...], request: Request, steps: Steps
) -> tuple[tuple[Term, ...], str]:
    """The terms, with the maps whose channels are last: the other axes follow the image's size.

    Models that take images of one size alone leave them on axis 1; then also why, for a warning.
    """
    small: Mapping[End, Tensor] = {}
    try:
        small = _values(request, steps, _same)
        large = _larger(request, steps)
    except Exception as error:  # of the models' own code
        return terms, _untold_channels(terms, small, request, error)
    told = tuple(
        replace(term, channels_last=_are_last(term, small, large))
        if _reads_channels(term)
        else term
        for term in terms
    )
    return told, ""


def _larger(request: Request, steps: Steps) -> Mapping[End, Tensor]:
    """All values of larger images, whose channels are first, or else last: the models take one."""
    try:
        return _values(request, steps, resized.larger)
    except Exception:  # of the models' own code: of a linear layer over the channels, for one
        with suppress(Exception):  # what stops the usual layout is what is told then
            return _values(request, steps, partial(resized.larger, channels_last=True))
        raise


def _untold_channels(
    terms: Sequence[Term], values: Mapping[End, Tensor], request: Request, error: Exception
) -> str:
    """The text that channels are taken to be on axis 1; empty where no value is known as a map."""
    names = [
        term.name
        for term in terms
        if _reads_channels(term)
        and any(
            not (last or first or _is_of_convolutions(end, request))
            and end in values
            and values[end].ndim >= resized.IMAGE_AXES
            for end, last, first in zip(
                term.taps, term.channels_last, term.channels_first, strict=True
            )
        )
    ]
    if not names:
        return ""
    return (
        f"the channels of {', '.join(names)} are taken to be on axis 1, because the models cannot "
        f"be run on images of another size ({said(error)}). rearrange= brings them there."
    )


def _is_of_convolutions(end: End, request: Request) -> bool:
    """Whether a value comes from a block of convolutions, which leave the channels on axis 1."""
    tower, tap = end
    if tap.port != "output" or tap.reads is not None:
        return False
    block = request.towers.modules[tower].get_submodule(tap.path)
    return places_of_convolutions(block) is not None


def _same(inputs: Inputs) -> Inputs:
    return inputs


def _values(
    request: Request, steps: Steps, change: Callable[[Inputs], Inputs]
) -> Mapping[End, Tensor]:
    inputs = {tower: change(given) for tower, given in request.call.inputs.items()}
    return dry.fake_values(replace(request, call=replace(request.call, inputs=inputs)), steps)


def _are_last(
    term: Term, small: Mapping[End, Tensor], large: Mapping[End, Tensor]
) -> tuple[bool, bool]:
    """Whether each value's second axis follows the image and its last does not."""
    ours, theirs = (
        known or (end in small and end in large and _is_last(small[end], large[end]))
        for end, known in zip(term.taps, term.channels_last, strict=True)
    )
    return ours, theirs


def _is_last(small: Tensor, large: Tensor) -> bool:
    if small.ndim < resized.IMAGE_AXES or small.ndim != large.ndim:
        return False
    return small.shape[1] != large.shape[1] and small.shape[-1] == large.shape[-1]
