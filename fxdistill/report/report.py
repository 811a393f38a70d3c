"""The report as a user holds it: the facts, and how they are shown."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType

from fxdistill.report.data import Facts
from fxdistill.report.faces import html
from fxdistill.report.faces.terminal import terminal


@dataclass(frozen=True)
class Report(Facts):
    """What ``distiller.report(...)`` returns: ``rich.print`` it, or keep it as JSON or HTML."""

    def to_html(self, path: str | Path) -> Path:
        """Write the report as one HTML file that needs nothing else, whole or not at all.

        Args:
            path: Where to; a file that is there is replaced.

        Returns:
            ``path``.
        """
        return html.write(self, Path(path))

    def __rich__(self) -> RenderableType:
        """The report for a terminal: ``rich.print(report)``."""
        return terminal(self)
