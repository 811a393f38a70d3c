"""Two models side by side in a terminal, with repeated blocks folded."""

from collections import Counter

from rich.text import Text

from fxdistill.report.data import Facts
from fxdistill.report.faces.folding import Row, block_index, blocks_in, couples, rows
from fxdistill.report.faces.terminal_tables import Part, row, table


def sketch(report: Facts) -> list[Part]:
    """A line for each run of equal blocks; between the models, how many pairs join them."""
    return [part for couple in couples(report) for part in _of_couple(report, *couple)]


def _of_couple(report: Facts, student: str, teacher: str) -> list[Part]:
    ours, theirs = rows(blocks_in(report, student)), rows(blocks_in(report, teacher))
    if not ours or not theirs:
        return []
    joined = _joined(report, student, teacher)
    made = table("Towers, and how many pairs join their blocks", student, "", teacher)
    for left, right in _lines(len(ours), len(theirs), joined):
        between = _between(left, right, joined, theirs)
        row(made, _told(ours, left), between, _told(theirs, right))
    return [made]


def _told(of: tuple[Row, ...], at: int | None) -> Text:
    if at is None:
        return Text()
    kinds = ", ".join(of[at].kinds)
    count = f" ×{of[at].count}" if of[at].count > 1 else ""
    return Text.assemble(f"{of[at].label}{count}", (f"\n  {kinds}" if kinds else "", "dim"))


def _joined(report: Facts, student: str, teacher: str) -> Counter[tuple[int, int]]:
    """The number of pairs that join a row of the student with a row of the teacher."""
    counts: Counter[tuple[int, int]] = Counter()
    students, teachers = blocks_in(report, student), blocks_in(report, teacher)
    ours, theirs = rows(students), rows(teachers)
    for pair in report.pairs:
        if (pair.student_model, pair.teacher_model) == (student, teacher):
            left, right = block_index(students, pair.student), block_index(teachers, pair.teacher)
            if left is not None and right is not None:
                counts[_row_of(ours, left), _row_of(theirs, right)] += 1
    return counts


def _row_of(of: tuple[Row, ...], block: int) -> int:
    return next(i for i, one in enumerate(of) if one.first <= block < one.first + one.count)


def _lines(
    ours: int, theirs: int, joined: Counter[tuple[int, int]]
) -> list[tuple[int | None, int | None]]:
    """The rows of both models, in order; joined rows share a line where the order allows it."""
    lines: list[tuple[int | None, int | None]] = []
    right = 0
    for left in range(ours):
        ends = [t for s, t in joined if s == left and t >= right]
        # Without pairs, align the ends of both models, so that their heads share a line.
        goal = min(ends) if ends else theirs - ours + left if not joined else right
        goal = min(max(goal, right), theirs - 1) if right < theirs else theirs
        lines += [(None, between) for between in range(right, goal)]
        lines.append((left, goal if goal < theirs else None))
        right = goal + 1 if goal < theirs else theirs
    return lines + [(None, rest) for rest in range(right, theirs)]


def _between(
    left: int | None, right: int | None, joined: Counter[tuple[int, int]], theirs: tuple[Row, ...]
) -> str:
    if left is None:
        return ""
    told = []
    for (ours, end), count in sorted(joined.items()):
        if ours == left:
            told.append(f"── {count} ──" if end == right else f"{count} → {theirs[end].label}")
    return "\n".join(told)
