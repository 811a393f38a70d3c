"""Log the losses of a training run: collect them on the device, read them on demand.

``add`` queues a few operators on 0-d tensors and never waits for the device. ``rows`` reads what
was collected, in one transfer for all terms of all windows. ``write_csv`` and ``write_scalars``
write these rows.
"""

import csv
import io
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fxdistill.base.tensors import scalar
from fxdistill.base.text import text
from fxdistill.distiller.output import DistillOutput
from fxdistill.errors import LogError, OptionError

_SHOWN_WINDOWS, _SHOWN_TERMS = 4, 12
_TOTALS = ("loss", "logits", "labels", "features")


@dataclass(frozen=True)
class LossRow:
    """The mean losses of the steps ``first`` to ``last``, both included.

    ``losses`` has the total as ``"loss"``, then every term by its name, unweighted. A mean is
    Σ w·value / Σ w over the steps that had the term, where w is the ``weight`` given to
    ``LossLog.add``; it is nan where Σ w is 0. ``weight`` is Σ w over all steps of the row.
    """

    first: int
    last: int
    weight: float
    losses: Mapping[str, float]


@dataclass
class _Window:
    """Sums on the device: for each set of names, Σ w·value of each name, followed by Σ w."""

    first: int
    steps: int = 0
    sums: dict[tuple[str, ...], Tensor] = field(default_factory=dict)


class LossLog:
    """Collect the losses of every step, and compute their means over windows of steps.

    ```python
    log = fxdistill.LossLog(every=20)
    for batch in batches:
        out = distiller(**batch)
        ...
        if log.add(out):  # every 20th step
            fxdistill.live.write_csv(log.rows(), "losses.csv")
            print(log)  # a table: rich.print(log)
    ```

    Args:
        every: The number of steps in a window; ``None``: all steps since the last ``rows()``.
        first: The number of the first step, for a run that continues another.

    Raises:
        OptionError: ``every`` is neither a positive integer nor ``None``.
    """

    def __init__(self, every: int | None = None, *, first: int = 0) -> None:
        if every is not None and (type(every) is not int or every < 1):
            raise OptionError(f"every={every!r}: a number of steps from 1, or None")
        self.every = every
        self._full: list[_Window] = []
        self._open = _Window(first)
        self._read: deque[LossRow] = deque(maxlen=_SHOWN_WINDOWS)

    @torch.no_grad()
    def add(self, out: DistillOutput, *, weight: float | Tensor = 1.0) -> bool:
        """Collect the losses of one step without reading them; ``out`` may be overwritten after.

        Args:
            out: The output of the distiller.
            weight: The weight of the step in the mean, such as the number of its tokens. A tensor
                stays on the device.

        Returns:
            Whether this step completes a window, so that ``rows()`` has a new row.
        """
        values = {"loss": out.loss, **out.losses}
        total = scalar(weight, out.loss.device)
        # Copy the values: a compiled step may overwrite its outputs in the next call.
        each = torch.stack([value.float() for value in values.values()]) * total
        now = torch.cat([each, total.reshape(1)])
        window, names = self._open, tuple(values)
        before = window.sums.get(names)
        window.sums[names] = now if before is None else before + now
        window.steps += 1
        if window.steps != self.every:
            return False
        self._close()
        return True

    def rows(self, *, partial: bool = False) -> tuple[LossRow, ...]:
        """The rows that are new since the last call; waits for the device once, if there are any.

        Args:
            partial: Include the window that is not complete yet, as at the end of a run. With
                ``every=None`` it is always included.

        Returns:
            One row for each window, in order.
        """
        if (partial or self.every is None) and self._open.steps:
            self._close()
        windows, self._full = self._full, []
        if not windows:
            return ()
        sums = [tensor for window in windows for tensor in window.sums.values()]
        numbers: list[float] = torch.cat(sums).tolist()  # the one transfer
        found = []
        for window in windows:
            count = sum(len(names) + 1 for names in window.sums)
            found.append(_row(window, numbers[:count]))
            numbers = numbers[count:]
        self._read += found
        return tuple(found)

    def _close(self) -> None:
        self._full.append(self._open)
        self._open = _Window(self._open.first + self._open.steps)

    def __rich__(self) -> Table:
        """A table of the windows that ``rows`` read last, with a line for each term."""
        table = Table(title="Losses", title_justify="left")
        table.add_column("step", overflow="fold")
        for row in self._read:
            table.add_column(f"{row.first}–{row.last}", justify="right")
        names = _names(self._read)
        chosen = _chosen(names, self._read[-1].losses) if self._read else []
        for name in chosen:
            cells = (row.losses.get(name) for row in self._read)
            table.add_row(Text(name), *("" if cell is None else f"{cell:.4g}" for cell in cells))
        if len(names) > len(chosen):
            table.caption = f"{len(names) - len(chosen)} smaller terms are not shown"
        return table

    def __str__(self) -> str:
        return text(self, 80)


def _row(window: _Window, numbers: Sequence[float]) -> LossRow:
    """The row of one window, from its sums as numbers."""
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for names in window.sums:
        weight, values = numbers[len(names)], numbers[: len(names)]
        numbers = numbers[len(names) + 1 :]
        for name, value in zip(names, values, strict=True):
            sums[name] = sums.get(name, 0.0) + value
            weights[name] = weights.get(name, 0.0) + weight
    means = {name: sums[name] / weights[name] if weights[name] else float("nan") for name in sums}
    return LossRow(window.first, window.first + window.steps - 1, weights["loss"], means)


def _names(rows: Iterable[LossRow]) -> list[str]:
    """The names of all terms, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.losses))


def _chosen(names: list[str], latest: Mapping[str, float]) -> list[str]:
    """The totals, and as many of the largest other terms as a screen holds; nan is the largest."""
    single = [name for name in names if name not in _TOTALS]
    size = {name: latest.get(name, 0.0) for name in single}
    largest = sorted(single, key=lambda n: (size[n] != size[n], size[n]), reverse=True)
    kept = {*_TOTALS, *largest[:_SHOWN_TERMS]}
    return [name for name in names if name in kept]


# ---- writers


def write_csv(rows: Iterable[LossRow], path: str | os.PathLike[str]) -> None:
    """Append a line for each row to a CSV file: first, last, weight, then the losses.

    A new file gets a header with all terms of ``rows``. The cell of a term that a row lacks is
    empty.

    Raises LogError, and writes nothing, where the file is not such a table, its last line is
    incomplete, or a row has a term that the header does not name.
    """
    found, target = list(rows), Path(path)
    if not found:
        return
    own = ["first", "last", "weight"]
    existing = _header(target, own)
    names = _names(found) if existing is None else existing
    for row in found:
        if new := [name for name in row.losses if name not in names]:
            raise LogError(
                f"{target} has columns for {', '.join(names)}; steps {row.first} to {row.last} "
                f"have {', '.join(new)} as well. Write to another file from here on."
            )
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    if existing is None:
        table.writerow([*own, *names])
    for row in found:
        cells = (row.losses.get(name) for name in names)
        table.writerow([row.first, row.last, row.weight, *cells])
    try:
        with target.open("a", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())
    except OSError as error:
        raise LogError(f"{target} cannot be written: {error.strerror}") from error


def _header(target: Path, own: list[str]) -> list[str] | None:
    """The terms that a file has columns for; ``None`` if there is no file, or it is empty."""
    try:
        with target.open("rb") as file:
            first = file.readline().decode("utf-8")
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            last = file.read(1)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise LogError(f"{target} cannot be read: {error}") from error
    if not first:
        return None
    columns = next(csv.reader([first]), [])
    if columns[: len(own)] != own:
        raise LogError(f"{target} is no table of losses: its first line is {first.strip()!r}")
    if last != b"\n":
        raise LogError(f"the last line of {target} is not whole: mend it, or use another file")
    return columns[len(own) :]


class ScalarWriter(Protocol):
    """Any object with ``add_scalar``, such as ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Record one number at a step."""


def write_scalars(rows: Iterable[LossRow], writer: ScalarWriter, prefix: str = "") -> None:
    """Pass every loss to ``writer.add_scalar`` as ``prefix + name``, at the row's last step."""
    for row in rows:
        for name, value in row.losses.items():
            writer.add_scalar(f"{prefix}{name}", value, row.last)
