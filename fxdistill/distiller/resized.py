"""Inputs like those of a call, but with texts of other lengths, or with images of another size.

Only their shapes are meant: they are for runs on fake tensors.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxdistill.objective.call import Inputs
from fxdistill.objective.tokens import Batch

Size = tuple[int, int]  # a batch and a length
IMAGE_AXES = 4


class Resize(NamedTuple):
    """The size of a model's tokens and of its decoder's, each with the length that they get."""

    tokens: Size | None
    length: int
    decoder: Size | None
    decoder_length: int

    def as_it_is(self) -> "Resize":
        """The same of the decoder, and the tokens left as they are."""
        return self._replace(length=0 if self.tokens is None else self.tokens[1])


def near(batch: Batch, fixed: Collection[int]) -> tuple[Resize, Resize]:
    """Two resizes to lengths nearby that no model has fixed, the decoder's unlike the encoder's."""
    tokens, decoder = size_of(batch.tokens), size_of(batch.decoder_tokens)
    first = _two(tokens, fixed)
    second = _two(decoder, {*fixed, *first})
    return Resize(tokens, first[0], decoder, second[0]), Resize(
        tokens, first[1], decoder, second[1]
    )


def _two(size: Size | None, avoided: Collection[int]) -> tuple[int, int]:
    """Two lengths near that of ``size``; shorter ones, because models may have a longest one."""
    if size is None:
        return 0, 0
    shorter = [n for n in range(size[1] - 1, 1, -1) if n not in avoided][:2]
    longer = [n for n in range(size[1] + 1, size[1] + len(avoided) + 3) if n not in avoided]
    one, other = shorter if len(shorter) == 2 else longer[:2]
    return one, other


def multiples(batch: Batch) -> tuple[Resize, Resize]:
    """Two resizes to multiples of the lengths, for models that read a text in chunks."""
    tokens, decoder = size_of(batch.tokens), size_of(batch.decoder_tokens)

    def times(by: int) -> Resize:
        length = by * tokens[1] if tokens else 0
        other = by * decoder[1] if decoder else 0
        other += decoder[1] if decoder and other == length else 0
        return Resize(tokens, length, decoder, other)

    return times(2), times(3)


def size_of(tokens: Tensor | None) -> Size | None:
    """The batch and the length of tokens."""
    if tokens is None or tokens.ndim < 2:
        return None
    return int(tokens.shape[0]), int(tokens.shape[1])


def named(inputs: Inputs) -> dict[str, Any]:
    """All inputs by their name, or by their position; those of a batch given as one mapping too."""
    found = {str(i): value for i, value in enumerate(inputs.args)}
    for value in inputs.args:
        found |= value if isinstance(value, Mapping) else {}
    return {**found, **inputs.kwargs}


def texts(inputs: Inputs, batch: Batch) -> set[str]:
    """The names of the inputs that may be tokens, of any text as long: ids, embeddings.

    Features are where no ids are.
    """
    size = size_of(batch.tokens)
    if size is None:
        return set()
    alike = {
        name: value
        for name, value in named(inputs).items()
        if isinstance(value, Tensor) and _are_tokens(name, value, size) and "mask" not in name
    }
    ids = {
        n
        for n, x in alike.items()
        if "embeds" in n or not (x.is_floating_point() or x.ndim >= IMAGE_AXES)
    }
    return ids or {name for name, value in alike.items() if value.ndim == 3}


def _are_tokens(name: str, value: Tensor, size: Size) -> bool:
    """Whether the first axes of an input are the tokens, or its samples, choices and tokens."""
    if tuple(value.shape[:2]) == size:
        return True
    return (not value.is_floating_point() or "embeds" in name) and _has_choices(value.shape, size)


def _has_choices(shape: Sequence[int], size: Size) -> bool:
    return len(shape) > 2 and shape[1] > 1 and (shape[0] * shape[1], shape[2]) == size


# The tokens of a call and what is said of them, by the names that Hugging Face's models have.
_OF_TEXT = frozenset(
    ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")
)


def of_text(inputs: Inputs, batch: Batch) -> set[str]:
    """The names of the inputs that surely are the batch's own tokens, or are said of them.

    Other inputs may be of a second text, however their sizes agree.
    """
    tokens = (batch.tokens, batch.attention_mask)
    known = {
        name
        for name, value in named(inputs).items()
        if name in _OF_TEXT or any(value is each for each in tokens if each is not None)
    }
    reads = texts(inputs, batch)
    return known if reads & known else known | reads  # without names, all that are alike


def reads_more(inputs: Inputs, batch: Batch) -> bool:
    """Whether more is read than one text with its mask, kinds and positions, or than one sound."""
    heard = sound(inputs, batch)
    known = of_text(inputs, batch) | ({heard.name} if heard is not None else set())
    return any(
        isinstance(value, Tensor) and value.ndim > 1 and name not in known
        for name, value in named(inputs).items()
    )


class Sound(NamedTuple):
    """An input whose frames are the tokens: samples ``[B, T]``, or a spectrum, on either side."""

    name: str
    size: Size  # of samples, or of the spectrum's own frames
    axis: int

    def resized(self, before: int, length: int) -> int:
        """How many samples make about ``length`` frames, where those there are make ``before``."""
        return self.size[1] + round((length - before) * self.size[1] / before)


def sound(inputs: Inputs, batch: Batch) -> Sound | None:
    """The sound that the tokens are frames of; ``None`` where a text is read, or no sound.

    Labels alone do not say that: those of a transcript are fewer than the frames.
    """
    size = size_of(batch.tokens)
    if size is None or batch.tokens is batch.labels:
        return None
    if any(not name.startswith("decoder") for name in texts(inputs, batch)):
        return None
    mask = named(inputs).get("attention_mask")
    masked = mask.shape if isinstance(mask, Tensor) and mask.ndim == 2 else None
    for name, value in named(inputs).items():
        if not _is_more(name, value) or value.ndim > 3 or value.shape[0] != size[0]:
            continue
        axis = 1 if value.ndim == 2 or masked == value.shape[:2] else 2
        if axis == 2 and masked != (value.shape[0], value.shape[2]):  # no mask says where time is
            axis = 1 if value.shape[1] > value.shape[2] else 2
        if value.shape[axis] >= max(1, size[1]) and not name.startswith("decoder"):
            return Sound(name, (size[0], int(value.shape[axis])), axis)
    return None


def _is_more(name: str, value: Any) -> bool:
    """Whether an input has numbers of a signal or an image, whose pixels may be bytes."""
    if not isinstance(value, Tensor) or value.ndim < 2 or "mask" in name or "embeds" in name:
        return False
    return value.is_floating_point() or value.ndim >= IMAGE_AXES


def images(inputs: Inputs) -> set[str]:
    """The names of the inputs that are images or videos, with channels before or behind."""
    return {
        name
        for name, value in named(inputs).items()
        if _is_more(name, value) and value.ndim >= IMAGE_AXES
    }


def of_length(inputs: Inputs, batch: Batch, resize: Resize, *, alone: bool = False) -> Inputs:
    """Inputs whose tokens have another length; ``alone``, so that nothing else as long follows."""
    reads, heard = texts(inputs, batch), sound(inputs, batch)
    own = of_text(inputs, batch)

    def change(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if heard is not None and resize.tokens is not None:
            samples = heard.resized(resize.tokens[1], resize.length)
            if name == heard.name:
                return _empty(name, value, _with(value, heard.axis, samples))
            if tuple(value.shape[:2]) == heard.size:  # the mask of its samples
                return _empty(name, value, _with(value, 1, samples))
        size, length = resize.tokens, resize.length
        if name.startswith("decoder"):
            size, length = resize.decoder, resize.decoder_length
        elif alone and name not in own:
            return value
        if size is None or (_is_more(name, value) and name not in reads):
            return value
        return _empty(name, value, _shape(value, size, length))

    return _each(inputs, change)


def _with(value: Tensor, axis: int, size: int) -> tuple[int, ...]:
    """The shape of ``value`` with another size of one axis."""
    shape = [int(n) for n in value.shape]
    shape[axis] = size
    return tuple(shape)


def _shape(value: Tensor, size: Size, length: int) -> tuple[int, ...]:
    """The shape of a tensor of ids, masks or positions whose tokens have ``length``."""
    shape = [int(n) for n in value.shape]
    if tuple(shape[:2]) == size:
        shape[1] = length
    elif _has_choices(shape, size):
        shape[2] = length
    elif shape and shape[-1] == size[1]:
        shape[-1] = length  # positions [1, L] or [3, B, L], masks [B, 1, L, L]
        if len(shape) > 3 and shape[-2] == size[1]:
            shape[-2] = length
    return tuple(shape)


def larger(inputs: Inputs, *, channels_last: bool = False) -> Inputs:
    """Inputs whose images are twice as high and four times as wide.

    They are ``[..., C, H, W]``, or ``[..., H, W, C]`` with ``channels_last``.
    """
    which = images(inputs)
    behind = 1 if channels_last else 0

    def change(name: str, value: Any) -> Any:
        if name not in which:
            return value
        shape = list(value.shape)
        shape[-2 - behind] *= 2
        shape[-1 - behind] *= 4
        return _empty(name, value, tuple(shape))

    return _each(inputs, change)


def longer(inputs: Inputs, axis: int) -> Inputs:
    """Inputs whose numbers are twice as many along ``axis``: of a signal, or of images."""

    def change(name: str, value: Any) -> Any:
        if not _is_more(name, value) or axis >= value.ndim:
            return value
        return _empty(name, value, _with(value, axis, 2 * int(value.shape[axis])))

    return _each(inputs, change)


def _each(inputs: Inputs, change: Any) -> Inputs:
    def changed(name: str, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return change(name, value)
        made: Any = type(value)  # a dict, or a tokenizer's own kind
        return made({key: change(key, each) for key, each in value.items()})

    args = tuple(changed(str(i), value) for i, value in enumerate(inputs.args))
    return Inputs(args, {name: change(name, value) for name, value in inputs.kwargs.items()})


def _empty(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    make = torch.ones if "mask" in name else torch.empty
    return make(shape, dtype=value.dtype, device=value.device)
