"""Tables in a terminal.

Every text of a report becomes a ``rich.text.Text``: rich would read brackets in a plain string (the
name of a model, say) as markup.
"""

from collections.abc import Sequence
from typing import TypeAlias

from rich import box
from rich.table import Table
from rich.text import Text

Part: TypeAlias = Table | Text
Cell: TypeAlias = str | Text


def table(title: str, *columns: str, right: Sequence[str] = ()) -> Table:
    """A table in the style of the report; the columns of ``right`` hold numbers."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    made.show_edge = made.pad_edge = False
    made.title_style = "bold"
    for column in columns:
        number = column in right
        made.add_column(
            column, justify="right" if number else "left", overflow="fold", no_wrap=number
        )
    return made


def row(made: Table, *cells: Cell) -> None:
    """Add a row; no cell is read as markup."""
    made.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))
