"""Which axes of matched values are tokens, and whose: asked of the models, on other inputs.

The sizes of a value may agree with those of the tokens by chance: latent vectors as many as the
words of a text, an image of 16 patches beside 16 tokens. So the models are run on fake tensors,
which compute nothing, with texts of two other lengths, an encoder's and a decoder's unlike each
other; what follows a length in both is of these tokens. Of sound they are its frames, which change
with its samples.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from fxdistill.distiller import channels, map_channels, resized
from fxdistill.distiller.asking import End, Seen, attempts, by_multiples, said, tried
from fxdistill.distiller.modes import Request, Steps
from fxdistill.distiller.resized import Resize, Size
from fxdistill.distiller.towers import Towers
from fxdistill.errors import LayoutError, StepError
from fxdistill.mapping.layout import pools_tokens
from fxdistill.models.conventions import Stream
from fxdistill.models.tap import Tower
from fxdistill.objective.arrange import arranged_shape
from fxdistill.objective.call import Call, Inputs
from fxdistill.objective.objective import Objective
from fxdistill.objective.term import Term
from fxdistill.objective.tokens import Batch


def asks(objective: Objective, call: Call, towers: Towers, steps: Steps) -> bool:
    """Whether a term or a head leaves open what indexes its values, and sizes cannot tell."""
    return channels.asks(objective) or _of_terms(objective, call, towers, steps)


def _of_terms(objective: Objective, call: Call, towers: Towers, steps: Steps) -> bool:
    """Whether a term leaves that open.

    Sizes tell where only a text is read, or only sound, and its length is none that a model has
    fixed, nor the number of samples.
    """
    if map_channels.asks(objective, call):
        return True
    batch = call.batch
    is_open = any(term.is_open for term in objective.features)
    if not is_open or not _has_grid(batch):
        return False
    if objective.task == "seq2seq":
        return True
    reading = _reading(call)
    if not any(resized.texts(*each) or resized.sound(*each) for each in reading):
        return False
    if any(resized.reads_more(*each) for each in reading):
        return True
    if any(_asks_for_itself(term, towers) for term in objective.features):
        return True
    fixed = steps.fixed_sizes(towers)
    grids = {grid for tower in call.inputs for grid in batch.of(tower).grids}
    return any(
        length in fixed or size * length in fixed or size == length for size, length in grids
    )


def _reading(call: Call) -> list[tuple[Inputs, Batch]]:
    return [(given, call.batch.of(tower)) for tower, given in call.inputs.items()]


def _asks_for_itself(term: Term, towers: Towers) -> bool:
    """Whether a path alone says that a value is seen, or a value may be a map of attention.

    A map is another port than what a module returns, or comes out of a module without weights (a
    softmax, a dropout).
    """
    if term.seems_to_see or not term.is_open or term.is_map or not _may_be_map(term):
        return term.seems_to_see
    tower, tap = term.taps[0]
    module = towers.modules[tower].get_submodule(tap.path)
    return tap.port != "output" or next(module.parameters(), None) is None


def _may_be_map(term: Term) -> bool:
    """Whether a term would compare maps of attention as they are."""
    return not any(term.layouts) and term.projection is None and term.kind.named


def _has_grid(batch: Batch) -> bool:
    return batch.tokens is not None or batch.decoder_tokens is not None


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
    is_open = any(term.is_open for term in terms)
    if is_open and _has_grid(request.call.batch):
        terms, why = _with_tokens(terms, request, steps)
    untold = ""
    if map_channels.asks(request.objective, request.call):
        terms, untold = map_channels.with_channels(terms, request, steps)
    whys = tuple(filter(None, (why, untold)))
    return Told(replace(objective, features=terms), " ".join(whys), whys[-1:] if untold else ())


# ---- tokens


def _with_tokens(
    terms: tuple[Term, ...], request: Request, steps: Steps
) -> tuple[tuple[Term, ...], str]:
    found: list[Exception] = []
    reads_more = any(resized.reads_more(*each) for each in _reading(request.call))
    for resizes, alone in attempts(request, steps):
        seen = tried(request, steps, resizes, alone=alone)
        if not isinstance(seen, Exception):
            # Where the length of a text alone makes them asked, other texts are not told of.
            always = request.objective.task == "seq2seq" or reads_more
            told = tuple(_told(term, seen, reads_more=reads_more, numbers=always) for term in terms)
            told = _padded(terms, told, seen, request, steps)
            of_sound = [t for t in told if t.stream == "encoder" and _stayed(resizes[0], t.of[0])]
            return told, _untold(of_sound, found)
        if not alone or isinstance(seen, StepError):  # alone, a text misses what goes with it
            found.append(seen)
        if isinstance(seen, StepError):
            break
    return terms, _untold(terms, found)


def _padded(
    terms: tuple[Term, ...],
    told: tuple[Term, ...],
    seen: Sequence[Seen],
    request: Request,
    steps: Steps,
) -> tuple[Term, ...]:
    """What was told, and told again of values that stay as long as the text is.

    They may be padded inside to that length, which multiples of it show, or have it by chance.
    """

    def is_as_long(term: Term) -> bool:
        tower, tap = term.taps[0]
        value = seen[0].values.get((tower, tap))
        size = None if value is None or value.ndim != 3 else tuple(value.shape[:2])
        return size in request.call.batch.of(tower).grids

    again = [
        term.is_open and not t.has_tokens and is_as_long(term)
        for term, t in zip(terms, told, strict=True)
    ]
    longer = by_multiples(request, steps) if any(again) else None
    if longer is None:
        return told
    return tuple(
        _told(term, longer, reads_more=not t.watched, numbers=False) if open_ else t
        for term, t, open_ in zip(terms, told, again, strict=True)
    )


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
        f"cannot be run on inputs of another length ({said(found[0])}). Match(tokens=...) says it."
    )


def _told(term: Term, seen: Sequence[Seen], *, reads_more: bool, numbers: bool) -> Term:
    """A term whose tokens are known, or known to be none of the call's.

    Values of a call that ``reads_more`` are not watched then, unless they follow the text. Of
    values ``[B, L]`` it is known where ``numbers`` says.
    """
    if not term.is_open:
        return term
    if not all(end in run.values for run in seen for end in term.taps):
        return term  # the step will say which module did not run
    if not all(_fits(term, run) for run in seen):
        return term  # the step will say which pattern, with all else that is wrong
    term = replace(term, is_map=term.is_map or _is_map(term, seen))
    ours = _agreed([_stream_of_value(term, run) for run in seen])
    s, t = (
        _agreed([_leading(run, end, run.values[end].shape) for run in seen]) for end in term.taps
    )
    pools = term.pools_tokens
    if term.seems_to_see:
        pools = pools_tokens(term.layouts[0]), pools_tokens(term.layouts[1])
    pooled = not term.keeps_tokens  # then its layout has taken the tokens away, whosever they were
    return replace(
        term,
        has_tokens=(pooled and (s is not None or not term.seems_to_see)) or ours is not None,
        pools_tokens=(pools[0] and s is not None, pools[1] and t is not None),
        stream=ours or s or t or term.stream,
        numbers=ours is not None
        and (term.numbers or (numbers and all(_are_numbers(term, run) for run in seen))),
        watched=not reads_more or pooled or ours is not None or _follows(term, seen),
    )


def _is_map(term: Term, seen: Sequence[Seen]) -> bool:
    """Whether both values are maps of attention, ``[B, heads, queries, keys]``: both follow."""
    return _may_be_map(term) and all(_attends(run, end) for run in seen for end in term.taps)


def _attends(run: Seen, end: End) -> bool:
    value = run.values[end]
    sizes = frozenset[Size]().union(*run.streams[end[0]].values())
    return value.ndim == 4 and all((value.shape[0], value.shape[i]) in sizes for i in (2, 3))


def _follows(term: Term, seen: Sequence[Seen]) -> bool:
    """Whether the student's value has other first sizes for texts of other lengths."""
    shapes = {tuple(run.values[term.taps[0]].shape[:2]) for run in seen}
    return len(shapes) > 1


def _agreed(streams: Sequence[Stream | None]) -> Stream | None:
    return streams[0] if len(set(streams)) == 1 else None


def _stream_of_value(term: Term, run: Seen) -> Stream | None:
    """Whose tokens index the student's value as the term compares it."""
    s, shape = run.values[term.taps[0]], _compared_shape(term, run)
    if term.of_attention or term.is_map:  # behind the queries there may be keys
        queries = 2 if term.is_map and s.ndim == 4 else 1
        streams = run.streams[term.of[0]].items()
        return next((n for n, sizes in streams if (shape[0], shape[queries]) in sizes), None)
    return _leading(run, term.taps[0], shape)


def _fits(term: Term, run: Seen) -> bool:
    """Whether the patterns of a match's layout describe its values."""
    try:
        _compared_shape(term, run)
    except LayoutError:
        return False
    return True


def _compared_shape(term: Term, run: Seen) -> tuple[int, ...]:
    """The shape of the student's value as the layout of a match leaves it."""
    s, t = (run.values[end] for end in term.taps)
    return arranged_shape(s, term.layouts[0], t, term.layouts[1])


def _are_numbers(term: Term, run: Seen) -> bool:
    """Whether the student's value has one number for each token."""
    shape = _compared_shape(term, run)
    sizes = [size for each in run.streams[term.of[0]].values() for size in each]
    flat = len(shape) == 1 and shape[0] in (batch * length for batch, length in sizes)
    return flat or (len(shape) == 2 and shape in sizes)


def _leading(run: Seen, end: End, shape: Sequence[int]) -> Stream | None:
    """Whose tokens are the first axes of a value: ``[B, L, ...]``, or flattened ``[B·L, ...]``."""
    for name, sizes in run.streams[end[0]].items():
        if tuple(shape[:2]) in sizes:
            return name
        if 1 <= len(shape) <= 2 and shape[0] in (batch * length for batch, length in sizes):
            return name
    return None
