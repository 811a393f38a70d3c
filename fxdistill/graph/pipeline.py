"""Run passes: call each one, lint and record its result, show it to observers."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TypeVar

from fxdistill.base.files import write_whole
from fxdistill.errors import FxDistillError, PassError
from fxdistill.graph.program import Pass, PassRecord, Program

P = TypeVar("P", bound=Program)
Observer = Callable[[PassRecord, Program], None]


def pass_name(p: Pass) -> str:
    """The name of a pass: its class, or the function itself."""
    return getattr(p, "__name__", type(p).__name__)


def run(program: P, passes: Sequence[Pass], between: Sequence[Observer] = ()) -> P:
    """Apply ``passes`` in order; the graph is valid before and after each.

    Observers see the record and the program after every pass. If a pass raises, a PassError names
    it and the passes before it; an FxDistillError, which tells the user what to do, passes through.
    """
    for p in passes:
        name, start, before = pass_name(p), perf_counter(), program
        _require_level(p, program)
        try:
            program = p(program)
            if program.gm is not before.gm:
                program.gm.graph.lint()
                program.gm.recompile()
        except FxDistillError:
            raise
        except Exception as error:
            done = ", ".join(record.name for record in before.history) or "none"
            raise PassError(
                f"pass {name} failed after passes: {done}: {_first_lines(error)}"
            ) from error
        record = PassRecord(
            name,
            len(before.gm.graph.nodes),
            len(program.gm.graph.nodes),
            tuple(o for o in program.outputs if o not in before.outputs),
            perf_counter() - start,
            program.gm is not before.gm,
            program.remarks[len(before.remarks) :],
            program.level,
            program.title,
            before.gm,
            program.gm,
        )
        program = replace(program, history=(*before.history, record))
        for observer in between:
            observer(record, program)
    return program


def _first_lines(error: Exception) -> str:
    """What an exception says, without the graph that torch.fx prints behind it."""
    told = f"{type(error).__name__}: {error}".splitlines()
    return "\n".join(told[:3])


def _require_level(p: Pass, program: Program) -> None:
    """Raise PassError if a pass has a ``level`` and the program is of another."""
    level = getattr(p, "level", program.level)
    if level != program.level:
        name = repr(program.title) if program.title else "that it was given"
        raise PassError(
            f"pass {pass_name(p)} works on the {level} level, and the program {name} is of the "
            f"{program.level} level: give the pass to a stage that has such programs (see "
            "passes/order.py)."
        )


_dumped: dict[str, int] = {}  # how many graphs this process has written, by folder


class Dump:
    """Write numbered program texts to the folder that ``FXDISTILL_DUMP`` names, for ``diff``.

    Each graph that is compiled has an object of its own.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.root = folder if folder is not None else os.environ.get("FXDISTILL_DUMP")
        self.folder: Path | None = None
        self.index = 0

    def write(self, name: str, program: Program) -> None:
        """Write ``NN_name.py``, whole or not at all."""
        if not self.root:
            return
        if self.folder is None:
            count = _dumped[self.root] = _dumped.get(self.root, 0) + 1
            # The first graph of a process goes to the folder itself, every other to a subfolder.
            self.folder = Path(self.root) if count == 1 else Path(self.root) / f"graph_{count}"
        target = self.folder / f"{self.index:02d}_{name}.py"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, program.code)
        self.index += 1

    def __call__(self, record: PassRecord, program: Program) -> None:
        """Observe a pass: write the program that it returned."""
        self.write(f"{program.title}_{record.name}".strip("_"), program)
