"""Small pictures made of block characters: bars and sparklines."""

import itertools
from collections.abc import Sequence

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEVELS = "▁▂▃▄▅▆▇█"


def bar(part: int, whole: int, width: int) -> str:
    """A bar for ``part``, where ``whole`` would have ``width`` characters; only 0 gives none."""
    if part <= 0 or whole <= 0:
        return ""
    eighths = max(1, round(8 * width * part / whole))
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def sparkline(numbers: Sequence[int], width: int) -> str:
    """A line of at most ``width`` characters that shows ``numbers``, from smallest to largest.

    Each character shows the largest of the numbers it stands for, so no peak is lost.
    """
    if not numbers:
        return ""
    cells = min(width, len(numbers))
    edges = [len(numbers) * i // cells for i in range(cells + 1)]
    tops = [max(numbers[a:b]) for a, b in itertools.pairwise(edges)]
    low, high = min(numbers), max(numbers)
    steps = len(_LEVELS) - 1
    return "".join(_LEVELS[round(steps * (top - low) / (high - low or 1))] for top in tops)
