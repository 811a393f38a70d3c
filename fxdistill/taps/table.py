"""The table of tapped values that markers write to while models run."""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fxdistill.base.transforms import level
from fxdistill.errors import FxDistillError, TapError
from fxdistill.models.tap import Section, Tap, Tower


@dataclass(frozen=True)
class Expectations:
    """Facts about a call that are known before its models run, for the checks of tapped values.

    ``vocabularies``: for each model with a sharded head, the number of vocabulary entries on this
    rank and in all. ``ranks``: for each model whose weights are DTensors, the sizes of their
    meshes. ``grids``: batch size and length of the tokens, and of the decoder's. ``verify`` checks
    all tapped values. ``labels_apart``: whether labels had another grid than logits, in calls
    where sizes told it.
    """

    frozen: frozenset[Tower] = frozenset()  # models that learn nothing
    vocabularies: Mapping[Tower, tuple[int, int]] = field(default_factory=dict)
    ranks: Mapping[Tower, frozenset[int]] = field(default_factory=dict)
    grids: tuple[tuple[int, int], ...] = ()
    verify: "Callable[[TapTable], None] | None" = None
    labels_apart: bool | None = None


class TapTable:
    """The values that one run of the models has tapped so far: ``tap`` adds, ``tapped`` reads."""

    def __init__(self, *, capturing: bool, expected: Expectations | None = None) -> None:
        self.capturing = capturing
        self.expected = Expectations() if expected is None else expected
        self.section = ""
        self.level = 0  # nested function transforms, when the model began
        self.values: dict[tuple[Tower, Tap], Tensor] = {}
        self.hidden: set[tuple[Tower, Tap]] = set()  # calls inside a transform: no values
        self.failure: FxDistillError | None = None
        self.warnings: list[str] = []
        self.labels_apart: bool | None = None  # in this run, where sizes tell it
        self.axes: dict[str, int] = {}  # of each term, how many axes its student's value has
        self.unweighed: dict[str, str] = {}  # by match: the warning, if its value follows the text
        self.further: dict[Tower, str] = {}  # fields of a model's output that are more logits
        self.problems: dict[tuple[Tower, str, str], FxDistillError] = {}  # by model, path and port
        # The tensors before the hooks of a parallel style, and local tensors after them by id.
        self.raw: tuple[Tensor, ...] = ()
        # The modules that run and whose attention is tapped, outermost first, with their ports.
        self.attending: list[tuple[Tower, str, tuple[str, ...]]] = []
        self.behind: dict[int, tuple[weakref.ref[Tensor], Callable[[Tensor], Tensor]]] = {}

    def begin(self, section: Section) -> None:
        """Start ``section`` afresh: dynamo may restart a trace from the top."""
        self.section, self.level = section, level()
        self.raw, self.behind, self.attending = (), {}, []
        for key in [key for key in self.values if key[0] == section]:
            del self.values[key]
        self.hidden = {key for key in self.hidden if key[0] != section}

    def add(self, path: str, port: str, value: Tensor) -> None:
        """Keep ``value`` for the next call of ``path``; inside a transform only count the call."""
        call = 0
        while (key := (self.section, Tap(path, port, call))) in self.values or key in self.hidden:
            call += 1
        if level() == self.level:
            self.values[key] = value
        else:
            self.hidden.add(key)

    def fail(self, error: FxDistillError) -> FxDistillError:
        """Keep ``error`` for the user, who would not see it in the exception that dynamo makes."""
        self.failure = error
        return error


class _Active(threading.local):
    table: TapTable | None = None


_active = _Active()


@contextlib.contextmanager
def recording(table: TapTable) -> Iterator[TapTable]:
    """Let the markers of this thread write to ``table``."""
    before, _active.table = _active.table, table
    try:
        yield table
    finally:
        _active.table = before


def capturing() -> bool:
    """Whether the current run is a trace to one graph, rather than an execution."""
    return _active.table is None or _active.table.capturing


def runs_frozen() -> bool:
    """Whether the running model is frozen."""
    table = _active.table
    return table is not None and table.section in table.expected.frozen


def active() -> TapTable | None:
    """The table that markers write to; ``None`` outside of ``recording``."""
    return _active.table


def not_executed(table: TapTable, tower: Tower, tap: Tap) -> TapError:
    """The error for a tap that has no value."""
    if (tower, tap) in table.hidden:
        return TapError(
            f"{tower} {str(tap)!r} lies inside a function that torch.vmap or torch.func "
            "transforms: its values do not leave it. Match the module around it."
        )
    # A call may have several values: those of attention.
    seen = (*table.values, *table.hidden)
    calls = len({k[1].call for k in seen if k[0] == tower and k[1].path == tap.path})
    module = f"{tower} module {tap.path!r}"
    what = f"call {tap.call} of {module}" if calls else module
    return TapError(
        f"{what} was not executed"
        + (f" (it ran {'once' if calls == 1 else f'{calls} times'})" if calls else "")
        + ", so there is nothing to match. Map a module that runs, or drop the pair."
    )
