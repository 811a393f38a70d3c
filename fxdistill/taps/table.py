"""The table that markers write to while models run."""

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
    """What is known of a call before its models run, for whoever checks what they tap.

    ``vocabularies``: by model whose head is sharded, how many of its entries are here and how many
    there are; ``ranks``: by model whose weights are DTensors, the sizes of their meshes; ``grids``:
    batch and length of what is indexed by token. ``verify`` checks all that was tapped.
    """

    frozen: frozenset[Tower] = frozenset()  # models that learn nothing
    vocabularies: Mapping[Tower, tuple[int, int]] = field(default_factory=dict)
    ranks: Mapping[Tower, frozenset[int]] = field(default_factory=dict)
    grids: tuple[tuple[int, int], ...] = ()
    verify: "Callable[[TapTable], None] | None" = None


class TapTable:
    """What one run of the models has tapped so far; filled by ``tap``, read by ``tapped``."""

    def __init__(self, *, capturing: bool, expected: Expectations | None = None) -> None:
        self.capturing = capturing
        self.expected = Expectations() if expected is None else expected
        self.section = ""
        self.level = 0  # of function transforms, where the model began
        self.values: dict[tuple[Tower, Tap], Tensor] = {}
        self.hidden: set[tuple[Tower, Tap]] = set()  # calls in a transform, which hides its values
        self.failure: FxDistillError | None = None
        self.warnings: list[str] = []
        self.problems: dict[tuple[Tower, str, str], FxDistillError] = {}  # by model, path and port
        # What a module returned before, and local values after, a parallel style's hooks.
        self.raw: tuple[Tensor, ...] = ()
        self.behind: dict[int, tuple[weakref.ref[Tensor], Callable[[Tensor], Tensor]]] = {}

    def begin(self, section: Section) -> None:
        """Start a tower. Dynamo may trace a function again from its top: then this starts over."""
        self.section, self.level = section, level()
        self.raw, self.behind = (), {}
        for key in [key for key in self.values if key[0] == section]:
            del self.values[key]
        self.hidden = {key for key in self.hidden if key[0] != section}

    def add(self, path: str, port: str, value: Tensor) -> None:
        """Keep ``value`` as the next call of ``path``; within a transform only count the call."""
        call = 0
        while (key := (self.section, Tap(path, port, call))) in self.values or key in self.hidden:
            call += 1
        if level() == self.level:
            self.values[key] = value
        else:
            self.hidden.add(key)

    def fail(self, error: FxDistillError) -> FxDistillError:
        """Remember ``error``: what dynamo makes of an exception does not reach the user."""
        self.failure = error
        return error


class _Active(threading.local):
    table: TapTable | None = None


_active = _Active()


@contextlib.contextmanager
def recording(table: TapTable) -> Iterator[TapTable]:
    """Make ``table`` the one that markers write to."""
    before, _active.table = _active.table, table
    try:
        yield table
    finally:
        _active.table = before


def capturing() -> bool:
    """Whether what runs now is traced to one graph, rather than executed."""
    return _active.table is None or _active.table.capturing


def runs_frozen() -> bool:
    """Whether the model that is running learns nothing."""
    table = _active.table
    return table is not None and table.section in table.expected.frozen


def active() -> TapTable | None:
    """The table that markers write to; ``None`` where nothing is recorded."""
    return _active.table


def not_executed(table: TapTable, tower: Tower, tap: Tap) -> TapError:
    """What to say of a tap that has no value."""
    if (tower, tap) in table.hidden:
        return TapError(
            f"{tower} {str(tap)!r} lies inside a function that torch.vmap or torch.func "
            "transforms: its values do not leave it. Match the module around it."
        )
    calls = sum(k[0] == tower and k[1].path == tap.path for k in (*table.values, *table.hidden))
    module = f"{tower} module {tap.path!r}"
    what = f"call {tap.call} of {module}" if calls else module
    return TapError(
        f"{what} was not executed"
        + (f" (it ran {'once' if calls == 1 else f'{calls} times'})" if calls else "")
        + ", so there is nothing to match. Map a module that runs, or drop the pair."
    )
