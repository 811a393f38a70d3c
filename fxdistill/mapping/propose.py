"""``match``: propose a mapping from the structure of the two models."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from fxdistill.errors import CountError, OptionError, StructureError, did_you_mean
from fxdistill.mapping.match import Match
from fxdistill.mapping.matches import Matches
from fxdistill.models.given import check_models
from fxdistill.models.landmarks import embedding_of, logits_module_of, norms_of
from fxdistill.models.structure import TOKEN_MLP, Block, Part, Stack, stacks_of
from fxdistill.models.weights import output_width

ROLES = ("embedding", "block", "mixer", "mlp", "norm", "logits")
STRATEGIES = ("uniform", "first", "last", "skip")
TRANSPOSED = "b d n -> b n d"
Layers = str | Mapping[int, int]


def match(
    student: nn.Module,
    teacher: nn.Module,
    roles: Iterable[str] = ("mixer", "mlp"),
    layers: Layers | Mapping[str, Layers] = "uniform",
) -> Matches:
    """Propose which layers to match, and say why.

    ``match`` finds the repeated blocks of both models, and in each block the mixers (attention,
    state space, linear attention, convolution) and the MLPs (dense, gated, mixture of experts). It
    pairs their outputs, as they are before they are added to the residual stream. Neither model is
    run, so both may be on the meta device.

    Args:
        student: The model with n blocks; ``layers`` gives each of them a teacher block.
        teacher: The model with m blocks.
        roles: Any of "mixer", "mlp", "block", "embedding" (of tokens; without one, the module
            before the first block), "norm" (the final norm) and "logits".
        layers: Which teacher block (counted from 0) student block i learns from. "uniform": the
            last of its share, ⌈(i+1)·m/n⌉ - 1, so that the last blocks are paired (TinyBERT, Jiao
            et al., 2020); "skip": the first of its share, i·⌊m/n⌋; "first": i; "last": m - n + i;
            or explicit, ``{0: 1, 1: 3}``. Models with several stacks of blocks (an encoder and a
            decoder, or stages) use it for each stack; ``{student stack: strategy}`` gives each
            stack its own.

    Returns:
        Explicit matches to edit, with ``project="auto"`` where the widths differ or are unknown.
        ``notes`` name the layers without a counterpart.

    Raises:
        StructureError: No repeated blocks or nothing to match is found, or the models have
            different numbers of stacks.
        CountError: The strategy needs more teacher blocks than there are.
        OptionError: A role, a strategy or a stack is unknown, an index is out of range, or a model
            is none.
    """
    check_models(student=student, teacher=teacher)
    wanted = _checked_roles(roles)
    s_stacks, t_stacks = _stacks(student, "student"), _stacks(teacher, "teacher")
    if len(s_stacks) != len(t_stacks):
        raise StructureError(
            f"the student has {_described(s_stacks)}, the teacher {_described(t_stacks)}: which "
            "belongs to which cannot be told. Name the pairs: {student path: teacher path}."
        )
    chosen = _strategies(layers, s_stacks)
    notes = _Notes()
    found: list[Match] = []
    if "embedding" in wanted:
        ends = [(embedding_of(m, st), st) for m, st in ((student, s_stacks), (teacher, t_stacks))]
        paths = ends[0][0], ends[1][0]
        widths = _entry_width(student, *ends[0]), _entry_width(teacher, *ends[1])
        found += _landmark("embedding", paths, widths, notes)
    norms = list(zip(norms_of(student, s_stacks), norms_of(teacher, t_stacks), strict=True))
    for s, t, strategy, norm in zip(s_stacks, t_stacks, chosen, norms, strict=True):
        found += _stack_matches(s, t, strategy, wanted, notes)
        if "norm" in wanted and norm != (None, None):
            found += _landmark("final norm", norm, _leaf_widths(student, teacher, norm), notes)
    if "norm" in wanted and all(norm == (None, None) for norm in norms):
        notes.add("no final norm found in either model")
    if "logits" in wanted:
        paths = logits_module_of(student, s_stacks), logits_module_of(teacher, t_stacks)
        found += _logits(paths, _leaf_widths(student, teacher, paths), notes)
    if not found:
        why = "; ".join(notes.lines()) or "no such module"
        raise StructureError(f"nothing to match for roles {', '.join(wanted)}: {why}")
    return Matches(found, notes.lines())


class _Notes:
    """The layers without a counterpart, one line for each kind, and other remarks."""

    def __init__(self) -> None:
        self.texts: dict[str, None] = {}
        self.alone: dict[tuple[str, str], list[str]] = {}

    def add(self, text: str) -> None:
        self.texts[text] = None

    def without(self, tower: str, part: Part) -> None:
        self.alone.setdefault((tower, part.kind), []).append(part.path)

    def lines(self) -> list[str]:
        folded = []
        for (tower, kind), paths in self.alone.items():
            other = "teacher" if tower == "student" else "student"
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            verb = "have" if more else "has"
            folded.append(f"{tower} {paths[0]}{more} ({kind}) {verb} no counterpart in the {other}")
        return [*folded, *self.texts]


def _checked_roles(roles: Iterable[str]) -> tuple[str, ...]:
    if not isinstance(roles, Iterable):
        raise OptionError(f"roles={roles!r}: any of {', '.join(ROLES)}")
    wanted = (roles,) if isinstance(roles, str) else tuple(roles)
    for role in wanted:
        if role not in ROLES:
            near = did_you_mean(str(role), ROLES)
            raise OptionError(f"no role {role!r}. Nearest: {near}; all: {', '.join(ROLES)}.")
    if not wanted:
        raise OptionError(f"roles=(): name at least one of {', '.join(ROLES)}")
    return wanted


def _stacks(model: nn.Module, tower: str) -> list[Stack]:
    if found := stacks_of(model):
        return found
    raise StructureError(
        f"no repeated blocks found in the {tower} ({type(model).__name__}): a stack is a list or "
        "Sequential of blocks with a mixer or an MLP each. Name the pairs: {student path: teacher "
        f"path}}; fxdistill.module_names({tower}) lists the paths."
    )


def _described(stacks: list[Stack]) -> str:
    names = ", ".join(f"{s.path or 'itself'!r} of {len(s.blocks)}" for s in stacks)
    return f"{len(stacks)} stack{'s' if len(stacks) > 1 else ''} of blocks ({names})"


# ---- depth


@dataclass(frozen=True)
class _Depth:
    """A strategy: its name for ``Match.reason``, and the teacher block of each student block."""

    name: str
    layers: Layers

    def pairs(self, n: int, m: int, stack: str) -> list[tuple[int, int]]:
        if isinstance(self.layers, Mapping):
            return self._explicit(self.layers, n, m, stack)
        if self.layers != "uniform" and n > m:
            raise CountError(
                f"layers={self.layers!r}: stack {stack!r} has {n} blocks in the student and {m} in "
                "the teacher, which is too few. layers='uniform' shares teacher blocks; "
                "{0: 0, 1: 0, ...} names them."
            )
        chosen = {
            "uniform": [-(-(i + 1) * m // n) - 1 for i in range(n)],
            "first": list(range(n)),
            "last": [m - n + i for i in range(n)],
            "skip": [i * (m // n) for i in range(n)],
        }[self.layers]
        return list(enumerate(chosen))

    def _explicit(
        self, layers: Mapping[int, int], n: int, m: int, stack: str
    ) -> list[tuple[int, int]]:
        for s, t in layers.items():
            for tower, index, count in (("student", s, n), ("teacher", t, m)):
                if type(index) is not int or not 0 <= index < count:
                    raise OptionError(
                        f"layers={dict(layers)}: the {tower} of stack {stack!r} has no block "
                        f"{index!r}; there are 0 to {count - 1}"
                    )
        return sorted(layers.items())


def _strategies(layers: Layers | Mapping[str, Layers], stacks: list[Stack]) -> list[_Depth]:
    """One strategy for each stack of the student."""
    paths = [stack.path for stack in stacks]
    if isinstance(layers, Mapping) and layers and all(isinstance(key, str) for key in layers):
        for key in layers:
            if key not in paths:
                near = did_you_mean(str(key), paths)
                raise OptionError(f"layers: the student has no stack {key!r}. Nearest: {near}.")
        each = [layers.get(path, "uniform") for path in paths]  # type: ignore[call-overload]
    else:
        each = [layers] * len(paths)
    for strategy in each:
        if isinstance(strategy, Mapping) and not strategy:
            raise OptionError("layers={}: name at least one pair of blocks, as in {0: 1, 1: 3}")
        if not isinstance(strategy, Mapping) and strategy not in STRATEGIES:
            near = did_you_mean(str(strategy), STRATEGIES)
            raise OptionError(
                f"layers={strategy!r}: {', '.join(STRATEGIES)}, or explicit, {{0: 1, 1: 3}}. "
                f"Nearest: {near}."
            )
    return [_Depth(s if isinstance(s, str) else "explicit", s) for s in each]


# ---- pairs


def _stack_matches(
    student: Stack, teacher: Stack, depth: _Depth, roles: tuple[str, ...], notes: _Notes
) -> list[Match]:
    n, m = len(student.blocks), len(teacher.blocks)
    found = []
    for tower, stack in (("student", student), ("teacher", teacher)):
        if "mixer" in roles and not any(block.of("mixer") for block in stack.blocks):
            notes.add(f"no mixer was recognised in the {tower}'s {stack.path!r}: name it yourself")
    for i, j in depth.pairs(n, m, student.path):
        s, t = student.blocks[i], teacher.blocks[j]
        where = f"{i} of {n} ← {j} of {m}, {depth.name}"
        for role in ("mixer", "mlp"):
            if role in roles:
                for a, b in _paired(s, t, role, notes):
                    pair = _match(a.path, b.path, s.width, t.width, f"{where}: {_kinds(a, b)}")
                    # An MLP that mixes tokens by linear layers acts on the transposed value.
                    sides = [TRANSPOSED if part.kind == TOKEN_MLP else None for part in (a, b)]
                    layout = (sides[0], sides[1]) if any(sides) else None
                    found.append(replace(pair, rearrange=layout))
        if "block" in roles and s.called and t.called:
            found.append(_match(s.path, t.path, s.width, t.width, f"{where}: block"))
        elif "block" in roles:
            path = t.path if s.called else s.path
            notes.add(f"block {path} and its like are lists that are never called: nothing to tap")
    return found


def _paired(s: Block, t: Block, role: str, notes: _Notes) -> list[tuple[Part, Part]]:
    """Pair the parts of two blocks by kind, or in order where equally many differ in kind."""
    ours, theirs = s.of(role), t.of(role)
    if len(ours) == len(theirs) and sorted(p.kind for p in ours) != sorted(p.kind for p in theirs):
        return list(zip(ours, theirs, strict=True))
    pairs = []
    rest = list(theirs)
    for part in ours:
        same = next((other for other in rest if other.kind == part.kind), None)
        if same is None and len(ours) == len(theirs) == 1:
            same = theirs[0]
        if same is None:
            notes.without("student", part)
        else:
            rest.remove(same)
            pairs.append((part, same))
    for part in rest:
        notes.without("teacher", part)
    return pairs


def _kinds(s: Part, t: Part) -> str:
    if s.kind != t.kind:
        return f"{s.kind} ({s.why}) ← {t.kind} ({t.why})"
    why = s.why if s.why == t.why else f"{s.why} ← {t.why}"
    return f"{s.kind} ({why})"


def _match(
    student: str, teacher: str, s_width: int | None, t_width: int | None, reason: str
) -> Match:
    if s_width is None or t_width is None or s_width != t_width:
        widths = " ← ".join("?" if width is None else str(width) for width in (s_width, t_width))
        reason = f"{reason}; {widths} wide"
        return Match(student, teacher, project="auto", reason=reason)
    return Match(student, teacher, reason=reason)


# ---- around the blocks

Ends = tuple[str | None, str | None]
Widths = tuple[int | None, int | None]


def _landmark(role: str, paths: Ends, widths: Widths, notes: _Notes) -> list[Match]:
    s, t = paths
    if s is None or t is None:
        notes.add(f"no {role} found in the {'student' if s is None else 'teacher'}")
        return []
    return [_match(s, t, *widths, role)]


def _logits(paths: Ends, widths: Widths, notes: _Notes) -> list[Match]:
    """Pair the logits if they are equally wide: no projection maps one vocabulary to another."""
    if None not in widths and widths[0] != widths[1]:
        notes.add(
            f"the logits are {widths[0]} and {widths[1]} wide and are not paired: logit_loss "
            "compares vocabularies that differ by padding"
        )
        return []
    return _landmark("logits", paths, widths, notes)


def _leaf_widths(student: nn.Module, teacher: nn.Module, paths: Ends) -> Widths:
    s, t = (
        None if path is None else output_width(model.get_submodule(path))
        for model, path in zip((student, teacher), paths, strict=True)
    )
    return s and s[0], t and t[0]


def _entry_width(model: nn.Module, path: str | None, stacks: list[Stack]) -> int | None:
    """The embedding's width, from the module itself or else from the first block's input."""
    leaf = None if path is None else output_width(model.get_submodule(path))
    return stacks[0].blocks[0].width_in if leaf is None else leaf[0]
