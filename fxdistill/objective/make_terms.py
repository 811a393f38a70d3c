"""Turn matches into terms of the objective, and make the projections that they ask for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fxdistill.errors import (
    FxDistillError,
    LayoutError,
    OptionError,
    ProjectionError,
    gather,
    raise_together,
)
from fxdistill.losses.memory_bank import CRD
from fxdistill.losses.names import (
    FEATURE_LOSSES,
    OF_ATTENTION,
    Loss,
    compares,
    is_named,
    loss_name,
    loss_of,
    of_attention,
)
from fxdistill.losses.samples import width_of_samples
from fxdistill.mapping import projections
from fxdistill.mapping.attends import is_named_attention
from fxdistill.mapping.layout import (
    Layout,
    keeps_samples,
    keeps_tokens,
    layouts,
    leaves_numbers,
    pools_tokens,
)
from fxdistill.mapping.match import Match
from fxdistill.mapping.matches import Matches
from fxdistill.mapping.projections import Width, structural_widths
from fxdistill.mapping.resolve import tap_of
from fxdistill.mapping.teachers import Teachers
from fxdistill.models.adapters import plain
from fxdistill.models.conventions import Stream, Task, stream_of
from fxdistill.models.tap import ATTENTION, Tap, Tower
from fxdistill.objective.arrange import arranged_shape
from fxdistill.objective.channels_first import (
    are_first,
    is_last,
    known_first,
    token_axis,
    tokens_first,
)
from fxdistill.objective.term import GLOBAL_SETTINGS, PAIRS, THRESHOLD, Term

RESERVED = ("loss", "logits", "labels", "features", PAIRS, THRESHOLD, *GLOBAL_SETTINGS)
Shapes = Mapping[tuple[Tower, Tap], Tensor]  # meta tensors with the shapes seen at the taps


def make_terms(
    student: nn.Module,
    matches: Matches,
    default: str | Callable[..., Tensor],
    task: Task | None,
    teachers: Teachers,
    pairs_loss: Callable[..., Tensor] | None = None,
) -> tuple[Term, ...]:
    """Make one term for each match, named by the student's tap, with ``#2`` at its second match.

    Where a match says of which teacher it is, ``of/`` stands before that. Matches without a loss of
    their own go to ``pairs_loss``, if there is one. Raises all errors in the matches' options
    together.
    """
    if pairs_loss is not None and not callable(pairs_loss):
        raise OptionError(
            f"pairs_loss={pairs_loss!r}: a callable (students, teachers, weights) -> scalar, each "
            "argument a list with an entry for every match"
        )
    seen: dict[str, int] = {}
    terms, problems = [], list[FxDistillError]()
    for match in matches:
        tap = tap_of(match, "student")
        base = str(tap) if match.of is None else f"{match.of}/{tap}"
        if base in RESERVED:  # a module that is named like another term: add its port
            base += ":output"
        seen[base] = seen.get(base, 0) + 1
        name = base if seen[base] == 1 else f"{base}#{seen[base]}"
        in_pairs = pairs_loss is not None and match.loss is None
        loss, both = check_options(match, name, student, pairs_loss or default, problems)
        gather(problems, _check_token_axis, match, student, tap)
        if in_pairs:
            gather(problems, _check_pair, match)
        if loss is not None and both is not None:
            tower = teachers.tower_of(match)
            other = student if tower is None else teachers.models[tower]
            terms.append(
                Term(
                    name,
                    loss,
                    tap,
                    tap_of(match, "teacher"),
                    match.weight,
                    _stream(match, student, tap, task),
                    layouts=both,
                    of=("student", "student" if tower is None else tower),
                    constant=tower is None,
                    keeps_tokens=keeps_tokens(both[0], token_axis(student, tap)),
                    pools_tokens=_pools(_has_tokens(match, tap), both),
                    keeps_samples=(keeps_samples(both[0]), keeps_samples(both[1])),
                    has_tokens=_has_tokens(match, tap),
                    said_tokens=match.tokens not in ("auto", None),
                    numbers=leaves_numbers(both[0], token_axis(student, tap)),
                    seems_to_see=match.tokens == "auto" and _seems_to_see(tap),
                    watched=match.tokens == "auto" and _has_tokens(match, tap),
                    channels_last=(is_last(student, tap), is_last(other, tap_of(match, "teacher"))),
                    channels_first=known_first(match, (student, other), both, is_named(loss)),
                    by_teacher=match.tokens == "teacher",
                    compares="anything" if match.shapes == "any" else compares(loss),
                    weights=match.weights,
                    is_map=_is_map(match, student, tap) and is_named(loss),
                    in_pairs=in_pairs,
                )
            )
    gather(problems, check_queues, terms)
    raise_together(problems)
    return tuple(terms)


def _is_map(match: Match, student: nn.Module, tap: Tap) -> bool:
    """Whether a match compares maps of attention, by its ports.

    They are the second output of a module that attends, or a model's ``attentions``. Of others the
    models tell, where they are asked.
    """
    ports = (match.student_port, match.teacher_port)
    as_they_are = match.rearrange is None and match.reduce is None and match.project is None
    by_port = ports == ("output[1]",) * 2 and is_named_attention(student.get_submodule(tap.path))
    by_name = all(isinstance(port, str) and "attentions" in port for port in ports)
    return as_they_are and (by_port or by_name)


def check_queues(terms: Sequence[Term]) -> None:
    """Raise OptionError where two matches share a queue: it holds samples of one value."""
    seen: dict[int, str] = {}
    for term in terms:
        if not isinstance(term.loss, CRD):
            continue
        if (first := seen.setdefault(id(term.loss), term.name)) != term.name:
            raise OptionError(
                f"{first!r} and {term.name!r} share one CRD, whose queue holds samples of one "
                "value: loss='CRD', or functools.partial(losses.CRD, size=...), makes one for "
                "each match"
            )


def _check_pair(match: Match) -> None:
    """Raise OptionError where one pair of a loss over all pairs has a weight of its own."""
    if isinstance(match.weight, Tensor) or match.weight != 1.0:
        raise OptionError(
            f"weight={match.weight!r} for {match.student!r}: pairs_loss takes all pairs and weighs "
            "them itself. distiller.set(weights={'pairs': ...}) weighs the whole term."
        )


def check_options(
    match: Match,
    name: str,
    student: nn.Module,
    default: str | Callable[..., Tensor],
    problems: list[FxDistillError],
) -> tuple[Loss | None, tuple[Layout, Layout] | None]:
    """The loss and the layouts of a match; errors in its options are added to ``problems``."""
    gather(problems, projections.check_option, match, student)
    what = "loss" if match.loss else "feature_loss"
    loss = gather(problems, loss_of, match.loss or default, FEATURE_LOSSES, what)
    gather(problems, _check_shapes, match, loss)
    gather(problems, _check_attention, match, loss)
    gather(problems, _check_tokens, match)
    gather(problems, _check_weights, match)
    return loss, gather(problems, layouts, match.rearrange, match.reduce, name)


def _check_attention(match: Match, loss: Loss | None) -> None:
    """Raise OptionError where the port ``"attention"`` has a loss or options that it cannot have.

    Its value is no tensor: queries, keys and mask, from which a loss of attention forms a map.
    """
    inside = ATTENTION in (match.student_port, match.teacher_port)
    if loss is None or not (inside or of_attention(loss)):
        return
    if is_named(loss) and not of_attention(loss):
        names = ", ".join(f.__name__ for f in OF_ATTENTION)
        raise OptionError(
            f"the port 'attention' for {match.student!r}: {loss_name(loss)} compares tensors, and "
            f"this port gives what a map is formed from. Take {names}, or a loss of your own; or "
            "the ports 'attention.q', '.k', '.v' and '.heads', which are tensors."
        )
    given = [n for n in ("project", "rearrange", "reduce") if getattr(match, n) is not None]
    if given:
        raise OptionError(
            f"{' and '.join(given)} for {match.student!r}: {loss_name(loss)} of the port "
            "'attention' takes it as it is, with any widths; heads= says which heads are compared"
        )


def _check_weights(match: Match) -> None:
    """Raise OptionError where ``weights`` is no name."""
    if match.weights is not None and not (isinstance(match.weights, str) and match.weights):
        raise OptionError(
            f"weights={match.weights!r} for {match.student!r}: a name, whose values a call brings: "
            "distiller(..., weights={name: tensor})"
        )


_STREAMS: dict[str | None, Stream] = {
    "input": "tokens",
    "encoder": "encoder",
    "decoder": "decoder",
    "teacher": "tokens",
    None: "tokens",
}


def _check_tokens(match: Match) -> None:
    """Raise OptionError where ``tokens`` is no option."""
    if match.tokens != "auto" and match.tokens not in _STREAMS:
        raise OptionError(
            f"tokens={match.tokens!r} for {match.student!r}: 'auto', 'input', 'encoder', "
            "'decoder', 'teacher' (its own inputs), or None for a value without tokens"
        )


def _check_token_axis(match: Match, student: nn.Module, tap: Tap) -> None:
    """Raise OptionError where ``tokens`` speaks of a value that is known to have them last."""
    as_it_is = match.rearrange is None and match.reduce is None and tap.port == "output"
    if match.tokens in ("auto", None) or not as_it_is or tap.reads is not None:
        return
    if isinstance(plain(student.get_submodule(tap.path)), nn.Conv1d):
        raise OptionError(
            f"tokens={match.tokens!r} for {match.student!r}: a 1-D convolution returns [B, C, L], "
            "with its tokens last. rearrange='b c l -> b l c' brings them to the second axis."
        )


def _stream(match: Match, student: nn.Module, tap: Tap, task: Task | None) -> Stream:
    said = match.tokens
    return stream_of(student, tap, task) if said == "auto" else _STREAMS.get(said, "tokens")


# Words in the path of a tower that sees: what it computes has no tokens of a text.
_SEEING = frozenset(("vision", "visual", "image", "video", "pixel"))
_READING = frozenset(("text", "language", "fusion", "cross", "projector", "qformer"))


def _has_tokens(match: Match, tap: Tap) -> bool:
    """Whether a value may have tokens, by what the match says or else by its path."""
    return match.tokens is not None and not (match.tokens == "auto" and _seems_to_see(tap))


def _seems_to_see(tap: Tap) -> bool:
    """Whether a path has words of a tower that sees: it may read a text all the same (VisualBERT).

    Where the models can be asked, they tell.
    """
    words = set(tap.path.replace(".", "_").lower().split("_"))
    return bool(words & _SEEING) and not words & _READING


def _pools(has_tokens: bool, both: tuple[Layout, Layout]) -> tuple[bool, bool]:
    """Whether each side's layout pools tokens; a value without tokens is pooled as it is."""
    if not has_tokens:
        return False, False
    return pools_tokens(both[0]), pools_tokens(both[1])


def _check_shapes(match: Match, loss: Loss | None) -> None:
    """Raise OptionError where ``shapes`` is no option, or one that the loss does not have."""
    if match.shapes not in ("equal", "any"):
        raise OptionError(f"shapes={match.shapes!r} for {match.student!r}: 'equal' or 'any'")
    equal = loss is not None and is_named(loss) and compares(loss) == "shapes"
    if match.shapes == "any" and equal:
        raise OptionError(
            f"shapes='any' for {match.student!r}: {loss_name(loss)} compares values of equal "
            "shapes. Give a loss of your own, project=, rearrange= or reduce=."
        )


def asks_for_width(terms: Sequence[Term], matches: Matches) -> bool:
    """Whether a projection, or the layers of a loss, have yet to be made."""
    projected = any(isinstance(match.project, str) for match in matches)
    return projected or any(_lacks_layers(term) for term in terms)


def _lacks_layers(term: Term) -> bool:
    return isinstance(term.loss, CRD) and not term.loss.is_built


def with_projections(
    terms: Sequence[Term],
    matches: Matches,
    models: Mapping[Tower, nn.Module],
    shapes: Shapes,
    problems: list[FxDistillError],
) -> tuple[tuple[Term, ...], nn.ModuleList]:
    """Make the projections, and give each term the index of its own.

    Matches that name one module share it. Widths come from ``shapes`` where both taps of a term are
    in it, and otherwise from the models' structure. A term whose projection cannot be made is left
    out, and the error is added to ``problems``.
    """
    structure = {}
    if asks_for_width(terms, matches):
        structure = {tower: structural_widths(model) for tower, model in models.items()}
    made: list[nn.Module] = []
    found = []

    def projection(term: Term, match: Match) -> nn.Module | None:
        if isinstance(match.project, nn.Module):
            return match.project
        learns = models[term.of[0]]
        like = learns.get_submodule(term.student.path)
        like = like if list(like.parameters()) else learns
        return projections.made(match, *_widths(term, shapes, structure), like)

    for term, match in zip(terms, matches, strict=True):
        before = len(problems)
        module = None if match.project is None else gather(problems, projection, term, match)
        if len(problems) > before:
            continue
        if module is not None and not any(m is module for m in made):
            made.append(module)
        index = next((i for i, m in enumerate(made) if m is module), None)
        found.append(term := replace(term, projection=index))
        if _lacks_layers(term):
            found_widths = _of_samples(term, shapes) or _widths(term, shapes, structure)
            gather(problems, _build, term, models[term.of[0]], *found_widths)
    return tuple(found), nn.ModuleList(made)


def _of_samples(term: Term, shapes: Shapes) -> tuple[Width, Width] | None:
    """The widths of what a loss between samples makes of both values, if their shapes are known."""
    if not all(end in shapes for end in term.taps):
        return None
    s, t = (shapes[end] for end in term.taps)
    (ours, theirs), tokens = term.layouts, term.said_tokens
    sides = arranged_shape(s, ours, t, theirs), arranged_shape(t, theirs, s, ours)
    first = are_first(term.channels_first, *sides)
    widths = [
        Width(width_of_samples(tokens_first(side, is_first), tokens))
        for side, is_first in zip(sides, first, strict=True)
    ]
    return widths[0], widths[1]


def _build(term: Term, like: nn.Module, student: Width | None, teacher: Width | None) -> None:
    """Make the layers of a loss for the widths that it compares."""
    student = teacher if term.projection is not None else student
    if student is None or teacher is None:
        raise ProjectionError(
            f"{loss_name(term.loss)} of {term.name!r} maps samples of both models to one width, "
            "and theirs cannot be told from the models' structure: give wrap(..., "
            "example_inputs={...}), from which it is read"
        )
    assert isinstance(term.loss, CRD)
    first = next(like.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    term.loss.embedding.build(student.size, teacher.size, device)


def _widths(
    term: Term,
    shapes: Shapes,
    structure: Mapping[Tower, Callable[[Tap, Layout], Width | None]],
) -> tuple[Width | None, Width | None]:
    (ours, theirs), ends = term.layouts, term.taps
    s, t = (
        structure[tower](tap, layout)
        for (tower, tap), layout in zip(ends, (ours, theirs), strict=True)
    )
    if not all(end in shapes for end in ends):
        return s, t
    values = [shapes[end] for end in ends]
    try:
        sides = (
            arranged_shape(values[0], ours, values[1], theirs),
            arranged_shape(values[1], theirs, values[0], ours),
        )
        known = [
            (width is not None and width.is_map) or first
            for width, first in zip((s, t), term.channels_first, strict=True)
        ]
        return projections.widths_by_shape(
            *sides,
            s is not None and not s.is_map,
            are_first(known, *sides),
        )
    except LayoutError as error:
        raise LayoutError(f"student {str(term.student)!r}: {error}") from None
