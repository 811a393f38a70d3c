"""Numbers as people read them, and small pictures made of block characters."""

import itertools
from collections.abc import Sequence

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEVELS = "▁▂▃▄▅▆▇█"


def bar(part: int, whole: int, width: int) -> str:
    """``part`` as a bar, of which ``whole`` has ``width`` characters; never empty above 0."""
    if part <= 0 or whole <= 0:
        return ""
    eighths = max(1, round(8 * width * part / whole))
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def sparkline(numbers: Sequence[int], width: int) -> str:
    """``numbers`` from their least to their greatest in at most ``width`` characters.

    Each character shows the greatest of the numbers it stands for, so that no peak is lost.
    """
    if not numbers:
        return ""
    cells = min(width, len(numbers))
    edges = [len(numbers) * i // cells for i in range(cells + 1)]
    tops = [max(numbers[a:b]) for a, b in itertools.pairwise(edges)]
    low, high = min(numbers), max(numbers)
    steps = len(_LEVELS) - 1
    return "".join(_LEVELS[round(steps * (top - low) / (high - low or 1))] for top in tops)
