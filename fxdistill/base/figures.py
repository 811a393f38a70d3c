"""Numbers formatted for people.

Private to torch and used here only: the ``node.hint`` of a symbolic size. If it moves, messages
show symbols.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_DECIMAL = ("", "k", "M", "G", "T", "P", "E")


def size(count: int) -> str:
    """Bytes in binary units: ``"1.50 GiB"``."""
    return _scaled(count, 1024, _BINARY)


def bytes_of(text: str) -> int | None:
    """The number of bytes that a text names: ``"80GB"`` (of 1000), ``"24 GiB"`` (of 1024)."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)(I?)B\s*", text.upper())
    if found is None:
        return None
    number, unit, binary = found.groups()
    base = 1024 if binary else 1000
    return round(float(number) * float(base ** " KMGTP".index(unit or " ")))


def operations(count: int) -> str:
    """Floating point operations in decimal units: ``"2.31 TFLOP"``."""
    return _scaled(count, 1000, tuple(f"{prefix}FLOP" for prefix in _DECIMAL))


def amount(count: int) -> str:
    """A number of parameters, as in the names of models: ``"8.03 B"``."""
    return _scaled(count, 1000, ("", "k", "M", "B", "T")).strip()


def ratio(ours: int, theirs: int) -> str:
    """``ours / theirs``: ``"1.35 ×"``; ``"–"`` where ``theirs`` is 0."""
    return f"{ours / theirs:.2f} ×" if theirs else "–"


def share(part: int, whole: int) -> str:
    """A part in percent of a whole: ``"45 %"``; ``"<1 %"`` below 1 % but not 0; ``"–"`` of 0."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    return "<1 %" if 0 < percent < 1 else f"{percent:.0f} %"


def _scaled(count: int, base: int, units: Sequence[str]) -> str:
    """The number with three significant digits, and the unit that fits."""
    number, unit = float(count), 0
    # 999.5 would be written as 1000 of the smaller unit.
    while abs(number) >= base - 0.5 and unit < len(units) - 1:
        number, unit = number / base, unit + 1
    if unit == 0:
        return f"{count} {units[0]}"
    digits = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:.{digits}f} {units[unit]}"


def shown(shape: Iterable[Any]) -> list[Any]:
    """A shape for a message: the numbers of the call where a trace has symbols for them."""
    return [number(size) for size in shape]


def number(size: Any) -> Any:
    """A size as the number that it is in this call; what only the data decides keeps its symbol."""
    known = getattr(getattr(size, "node", None), "hint", None)
    return size if known is None else known
