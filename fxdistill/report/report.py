"""``Report``: the facts about a step, and the ways to show them."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType

from fxdistill.base.text import fitting
from fxdistill.report.data import Facts
from fxdistill.report.faces import html
from fxdistill.report.faces.terminal import pairs, terminal
from fxdistill.report.fit import Fit, fit_of


@dataclass(frozen=True)
class Report(Facts):
    """The result of ``distiller.report(...)``: ``rich.print`` it, or keep it as JSON or HTML."""

    def to_html(self, path: str | Path) -> Path:
        """Write the report as one self-contained HTML file, whole or not at all.

        Args:
            path: The file to write; an existing one is replaced.

        Returns:
            ``path``.

        Raises:
            OSError: The file cannot be written.
        """
        return html.write(self, Path(path))

    def fit(self, memory: int | str, optimizer: str = "AdamW") -> Fit:
        """Whether the step fits, with the states of an optimizer.

        Args:
            memory: Bytes, or a text such as ``"80GB"`` or ``"24GiB"``.
            optimizer: One of the report's ``memory.optimizers``.

        Returns:
            A ``Fit``: it is true where the step fits, and prints what it needs and what to do.

        Raises:
            OptionError: The size or the optimizer is none, or the report does not know the memory.
        """
        return fit_of(self, memory, optimizer)

    def __rich__(self) -> RenderableType:
        """The report for a terminal: ``rich.print(report)``."""
        return terminal(self)

    def __str__(self) -> str:
        """The same as plain text, as wide as its tables need: ``print(report)``."""
        return fitting(terminal(self), pairs(self))
