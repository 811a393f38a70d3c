"""Which axes of matched values are tokens, and whose: asked of the models, on other inputs.

The sizes of a value may agree with those of the tokens by chance: latent vectors as many as the
words of a text, an image of 16 patches beside 16 tokens. So the models are run on fake tensors,
which compute nothing, with texts of two other lengths, an encoder's and a decoder's unlike each
other; what follows a length in both is of these tokens. Of sound they are its frames, which change
with its samples. A map's channels are told likewise, from images of twice the size: they are the
axis that stays.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from torch import Tensor

from fxdistill.distiller import channels, dry, resized
from fxdistill.distiller.modes import Request, Steps
from fxdistill.distiller.resized import Resize, Size
from fxdistill.distiller.towers import Towers
from fxdistill.errors import StepError
from fxdistill.models.axes import places_of_convolutions
from fxdistill.models.conventions import Stream
from fxdistill.models.tap import Tap, Tower
from fxdistill.objective.arrange import arranged_shape
from fxdistill.objective.call import Call, Inputs, grid_of
from fxdistill.objective.objective import Objective
from fxdistill.objective.term import Term
from fxdistill.objective.tokens import Batch

End = tuple[Tower, Tap]


Sizes = frozenset[Size]  # those that tokens may have, where it is not known how many frames are


class Seen(NamedTuple):
    """The values of one run on fake tensors, and the sizes of each model's tokens in it."""

    values: Mapping[End, Tensor]
    streams: Mapping[Tower, Mapping[Stream, Sizes]]


def asks(objective: Objective, call: Call, towers: Towers, steps: Steps) -> bool:
    """Whether a term or a head leaves open what indexes its values, and sizes cannot tell."""
    return channels.asks(objective) or _of_terms(objective, call, towers, steps)


def _of_terms(objective: Objective, call: Call, towers: Towers, steps: Steps) -> bool:
    """Whether a term leaves that open.

    Sizes tell where only a text is read, or only sound, and its length is none that a model has
    fixed, nor the number of samples.
    """
    if _asks_for_channels(objective, call):
        return True
    batch = call.batch
    is_open = any(term.has_tokens and not term.said_tokens for term in objective.features)
    if not is_open or not _has_grid(batch):
        return False
    if objective.task == "seq2seq":
        return True
    reading = [(given, batch.of(tower)) for tower, given in call.inputs.items()]
    if not any(resized.texts(*each) or resized.sound(*each) for each in reading):
        return False
    if any(resized.reads_more(*each) for each in reading):
        return True
    fixed = steps.fixed_sizes(towers)
    grids = {grid for tower in call.inputs for grid in batch.of(tower).grids}
    return any(
        length in fixed or size * length in fixed or size == length for size, length in grids
    )


def _has_grid(batch: Batch) -> bool:
    return batch.tokens is not None or batch.decoder_tokens is not None


_OF_CHANNELS = frozenset(("l2", "cosine", "fitnet", "attention_transfer", "fpn"))


def _reads_channels(term: Term) -> bool:
    """Whether the loss tells channels from places; a layout says what the axes are."""
    if not term.kind.named or term.of_attention or term.is_map or any(term.layouts):
        return False
    among = term.kind.name in _OF_CHANNELS or term.kind.sees == "samples together"
    return among or term.weights is not None


def _asks_for_channels(objective: Objective, call: Call) -> bool:
    reads = any(_reads_channels(term) for term in objective.features)
    return reads and any(resized.images(inputs) for inputs in call.inputs.values())


class Told(NamedTuple):
    """The objective, with what indexes its values; and why that could not be told, or ``""``.

    ``doubts`` are to be warned of: a guess at the channels may compare the wrong axes.
    """

    objective: Objective
    why: str
    doubts: tuple[str, ...]


def told(request: Request, steps: Steps) -> Told:
    """Tell what indexes the values of all terms, and of heads that pool.

    A model that cannot run on fake tensors (because data decides its sizes) leaves the terms as
    they are: their values have tokens where their sizes agree.
    """
    terms, why = request.objective.features, ""
    objective = replace(request.objective, heads=channels.told(request, steps))
    if not _of_terms(objective, request.call, request.towers, steps):
        return Told(objective, why, ())
    is_open = any(term.has_tokens and not term.said_tokens for term in terms)
    if is_open and _has_grid(request.call.batch):
        terms, why = _with_tokens(terms, request, steps)
    untold = ""
    if _asks_for_channels(request.objective, request.call):
        terms, untold = _with_channels(terms, request, steps)
    whys = tuple(filter(None, (why, untold)))
    return Told(replace(objective, features=terms), " ".join(whys), whys[-1:] if untold else ())


# ---- tokens


def _with_tokens(
    terms: tuple[Term, ...], request: Request, steps: Steps
) -> tuple[tuple[Term, ...], str]:
    found: list[Exception] = []
    for resizes, alone in _attempts(request, steps):
        seen = _tried(request, steps, resizes, alone=alone)
        if not isinstance(seen, Exception):
            told = tuple(_told(term, seen) for term in terms)
            of_sound = [t for t in told if t.stream == "encoder" and _stayed(resizes[0], t.of[0])]
            return told, _untold(of_sound, found)
        if not alone or isinstance(seen, StepError):  # alone, a text misses what goes with it
            found.append(seen)
        if isinstance(seen, StepError):
            break
    return terms, _untold(terms, found)


def _stayed(resizes: Mapping[Tower, Resize], tower: Tower) -> bool:
    """Whether a model was asked with as many tokens as there are."""
    tokens = resizes[tower].tokens
    return tokens is not None and resizes[tower].length == tokens[1]


def _untold(terms: Iterable[Term], found: Sequence[Exception]) -> str:
    """The note on terms whose tokens are taken from their sizes; empty where there are none."""
    names = [term.name for term in terms if term.has_tokens and not term.said_tokens]
    if not names:
        return ""
    return (
        f"whose tokens index {', '.join(names)} is taken from their sizes, because the models "
        f"cannot be run on inputs of another length ({_said(found[0])}). Match(tokens=...) says it."
    )


def _said(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


Resizes = list[dict[Tower, Resize]]  # those of each run, by model


def _tried(
    request: Request, steps: Steps, resizes: Resizes, *, alone: bool
) -> list[Seen] | Exception:
    """The runs on other lengths, or what stops one: a multiple of the length may do instead."""
    try:
        return [_seen(request, steps, of_models, alone=alone) for of_models in resizes]
    except Exception as error:  # of the models' own code
        return error


def _attempts(request: Request, steps: Steps) -> Iterator[tuple[Resizes, bool]]:
    """What to try: near lengths that no model has fixed, then multiples; two of each.

    A second text may be as long, so that each is tried with the text alone at first; what goes with
    it, and what has no known name, may have to be as long. A model that hears sound of one length
    alone may still be asked for its decoder's tokens.
    """
    batch, towers = request.call.batch, request.towers.modules
    fixed = steps.fixed_sizes(request.towers)
    reading = [(given, batch.of(tower)) for tower, given in request.call.inputs.items()]
    is_more = any(resized.reads_more(*each) for each in reading)
    near = {tower: resized.near(batch.of(tower), fixed) for tower in towers}
    multiples = {tower: resized.multiples(batch.of(tower)) for tower in towers}
    for pairs in (near, multiples):
        resizes = [{tower: pair[i] for tower, pair in pairs.items()} for i in range(2)]
        if is_more:
            yield resizes, True
        yield resizes, False
    if request.objective.task == "seq2seq" and any(resized.sound(*each) for each in reading):
        yield [{tower: pair[i].as_it_is() for tower, pair in near.items()} for i in range(2)], False


def _seen(request: Request, steps: Steps, resizes: Mapping[Tower, Resize], *, alone: bool) -> Seen:
    """One run on other lengths: all values, and the size of each stream of each model."""
    call, task = request.call, request.objective.task
    inputs = {
        tower: resized.of_length(given, call.batch.of(tower), resizes[tower], alone=alone)
        for tower, given in call.inputs.items()
    }
    streams = {}
    for tower, given in inputs.items():
        grid, resize = grid_of(request.towers.modules[tower], given, task), resizes[tower]
        first: Stream = "encoder" if task == "seq2seq" else "tokens"
        decoder = resized.size_of(grid.decoder_tokens)
        heard = resized.sound(call.inputs[tower], call.batch.of(tower)) is not None
        sizes: dict[Stream, Sizes] = {
            first: _sizes(grid.tokens, resize, heard=heard),
            "decoder": frozenset(() if decoder is None else (decoder,)),
        }
        streams[tower] = {name: each for name, each in sizes.items() if each}
    shown = replace(request, call=replace(call, inputs=inputs))
    return Seen(dry.fake_values(shown, steps), streams)


def _sizes(tokens: Tensor | None, resize: Resize, *, heard: bool) -> Sizes:
    """The size of tokens; where the inputs do not have them, that of labels, with the new length.

    Of ``heard`` sound the inputs may not tell how many frames it has: about as many.
    """
    if resize.tokens is None:
        return frozenset()
    if (size := resized.size_of(tokens)) is not None:
        return frozenset((size,))
    (batch, before), length = resize.tokens, resize.length
    about = 1 + abs(length - before) // 16 if heard and length != before else 0
    return frozenset((batch, n) for n in range(length - about, length + about + 1) if n > 0)


def _told(term: Term, seen: Sequence[Seen]) -> Term:
    if term.said_tokens or not term.has_tokens:
        return term
    if not all(end in run.values for run in seen for end in term.taps):
        return term  # the step will say which module did not run
    ours = _agreed([_stream_of_value(term, run) for run in seen])
    s, t = (
        _agreed([_leading(run, end, run.values[end].shape) for run in seen]) for end in term.taps
    )
    pools = term.pools_tokens
    pooled = not term.keeps_tokens  # then its layout has taken the tokens away, whosever they were
    return replace(
        term,
        has_tokens=pooled or ours is not None,
        pools_tokens=(pools[0] and s is not None, pools[1] and t is not None),
        stream=ours or s or t or term.stream,
    )


def _agreed(streams: Sequence[Stream | None]) -> Stream | None:
    return streams[0] if len(set(streams)) == 1 else None


def _stream_of_value(term: Term, run: Seen) -> Stream | None:
    """Whose tokens index the student's value as the term compares it."""
    (ours, theirs), (s, t) = term.layouts, (run.values[end] for end in term.taps)
    shape = tuple(s.shape)
    if term.of_attention or term.is_map:  # behind the queries there may be keys
        queries = 2 if term.is_map and s.ndim == 4 else 1
        streams = run.streams[term.of[0]].items()
        return next((n for n, sizes in streams if (shape[0], shape[queries]) in sizes), None)
    if ours:
        shape = arranged_shape(s, ours, t, theirs)
    return _leading(run, term.taps[0], shape)


def _leading(run: Seen, end: End, shape: Sequence[int]) -> Stream | None:
    """Whose tokens are the first axes of a value: ``[B, L, ...]``, or flattened ``[B·L, ...]``."""
    for name, sizes in run.streams[end[0]].items():
        if tuple(shape[:2]) in sizes and len(shape) > 2:
            return name
        if len(shape) == 2 and shape[0] in (batch * length for batch, length in sizes):
            return name
    return None


# ---- channels


def _with_channels(
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
        f"be run on images of another size ({_said(error)}). rearrange= brings them there."
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
