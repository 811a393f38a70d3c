"""What lowers the terms of regional mode in tests: ``aot_eager``.

``compile="regional"`` takes Inductor, which compiles the terms of a toy for 10 to 30 s; the sums
are the same without it. Tests that are marked ``inductor`` keep it.
"""

import dataclasses
from importlib import import_module
from typing import Any

from fxdistill.distiller.options import Options, read_options

READERS = ("fxdistill.distiller.wrap", "fxdistill.recipes.mutual")


def read_eagerly(*args: Any) -> Options:
    options = read_options(*args)
    if options.mode != "regional":
        return options
    lowering = dataclasses.replace(options.lowering, backend="aot_eager")
    return dataclasses.replace(options, lowering=lowering)


def lower_terms_eagerly(setattr: Any = setattr) -> None:
    """For the rest of this process; for one test with the ``setattr`` of pytest's monkeypatch."""
    for reader in READERS:
        setattr(import_module(reader), "read_options", read_eagerly)
