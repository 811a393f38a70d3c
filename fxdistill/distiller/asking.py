"""Runs of the models on fake tensors, on texts and sound of other lengths: what follows them."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from fxdistill.distiller import dry, resized
from fxdistill.distiller.modes import Request, Steps
from fxdistill.distiller.resized import Resize, Size
from fxdistill.models.conventions import Stream
from fxdistill.models.tap import Tap, Tower
from fxdistill.objective.call import grid_of

End = tuple[Tower, Tap]
Sizes = frozenset[Size]  # those that tokens may have, where it is not known how many frames are


class Seen(NamedTuple):
    """The values of one run on fake tensors, and the sizes of each model's tokens in it."""

    values: Mapping[End, Tensor]
    streams: Mapping[Tower, Mapping[Stream, Sizes]]


Resizes = list[dict[Tower, Resize]]  # those of each run, by model


def tried(
    request: Request, steps: Steps, resizes: Resizes, *, alone: bool
) -> list[Seen] | Exception:
    """The runs on other lengths, or what stops one: a multiple of the length may do instead."""
    try:
        return [_seen(request, steps, of_models, alone=alone) for of_models in resizes]
    except Exception as error:  # of the models' own code
        return error


def attempts(request: Request, steps: Steps) -> Iterator[tuple[Resizes, bool]]:
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


def by_multiples(request: Request, steps: Steps) -> list[Seen] | None:
    """The runs on multiples of the length, or else on near ones; ``None`` where there are none.

    Where a model pads its text inside, near lengths may all become the same.
    """
    given = list(attempts(request, steps))
    half = len(given) // 2
    for resizes, alone in (*given[half:], *given[:half]):
        lengths = [[resize.length for resize in run.values()] for run in resizes]
        if lengths[0] == lengths[1]:
            continue  # the text stays as it is, and only that of a decoder changes
        seen = tried(request, steps, resizes, alone=alone)
        if not isinstance(seen, Exception):
            return seen
    return None


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
            first: _sizes(grid.tokens, resize, heard=heard)
            | frozenset((mask.shape[0], mask.shape[1]) for mask in grid.frames),
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


def said(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
