"""``fxdistill losses``: the losses that have a name, what each computes, and its options."""

import argparse
import inspect
from collections.abc import Iterator
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fxdistill.cli.console import FINE
from fxdistill.losses.names import (
    LABEL_LOSSES,
    LOGIT_LOSSES,
    OF_ATTENTION,
    OF_MAPS,
    OF_PLACES,
    OF_SAMPLES,
    options_of,
)

_WIDE = 1000  # columns of output that other programs read line by line
FAMILIES: dict[str, tuple[Any, ...]] = {
    "features, place by place": OF_PLACES,
    "maps": OF_MAPS,
    "samples": OF_SAMPLES,
    "attention": OF_ATTENTION,
    "logits": tuple(LOGIT_LOSSES.values()),
    "labels": tuple(LABEL_LOSSES.values()),
}


def losses(args: argparse.Namespace, out: TextIO) -> int:
    """Run ``fxdistill losses``."""
    console = Console(file=out, highlight=False)
    if not console.is_terminal:
        console.width = _WIDE
    table = Table("name", "computes", "options", box=None, pad_edge=False)
    for family, members in FAMILIES.items():
        table.add_row(Text(family, style="bold"))
        for loss in members:
            says = str(inspect.getdoc(loss)).partition("\n\n")[0].replace("\n", " ")
            table.add_row(f"  {loss.__name__}", Text(says), Text(", ".join(_options(loss))))
    console.print(table)
    return FINE


def _options(loss: Any) -> Iterator[str]:
    for name, parameter in options_of(loss).items():
        yield f"{name}={parameter.default!r}"
