"""The costs of a step in a terminal: FLOPs, and memory by part and over time."""

import dataclasses

from rich.text import Text

from fxdistill.base.figures import operations, ratio, share, size
from fxdistill.report.data import Facts, Flops, Memory, Moment, Plain
from fxdistill.report.faces.bars import bar, sparkline
from fxdistill.report.faces.terminal_tables import Part, row, table

_BAR = 24
_LINE = 64


def costs(report: Facts) -> list[Part]:
    """Tables and bars of the costs that are known."""
    parts: list[Part] = []
    if report.flops is not None:
        parts.append(_flops(report.flops))
    if report.memory is not None:
        parts += _memory(report.memory)
    if report.plain is not None:
        parts += _beside(report, report.plain)
    return parts


def _flops(flops: Flops) -> Part:
    made = table("FLOPs of a step", "for", "FLOPs", "", "share", right=("FLOPs", "share"))
    for name, count in dataclasses.asdict(flops).items():
        if name == "total":
            row(made, Text(name, style="bold"), Text(operations(count), style="bold"), "", "")
        elif count:
            length = bar(count, flops.total, _BAR)
            row(made, name, operations(count), length, share(count, flops.total))
    return made


def _memory(memory: Memory) -> list[Part]:
    made = table("Memory", "part", "bytes", "", right=("bytes",))
    parts = {f"weights, {tower}": count for tower, count in memory.weights.items()}
    parts |= {
        "gradients, at the end": memory.gradients,
        "saved for the backward": memory.saved,
        "transient, at the peak": memory.transient,
        "taps, at most": memory.taps,
        "head, at most": memory.head,
    }
    for name, count in parts.items():
        row(made, name, size(count), bar(count, memory.peak, _BAR))
    row(
        made,
        Text("peak", style="bold"),
        Text(size(memory.peak), style="bold"),
        Text(f"at {memory.peak_at}", style="bold"),
    )
    for optimizer, count in memory.optimizers.items():
        whole = f"states {size(count)}" if count else "no states"
        row(made, f"peak with {optimizer}", size(memory.peak + count), whole)
    return [made, *([_at_peak(memory), _timeline(memory.timeline)] if memory.timeline else [])]


def _at_peak(memory: Memory) -> Text:
    """The owners whose sum is the peak; the parts in the table each have a moment of their own."""
    moment = max(memory.timeline, key=lambda moment: moment.total)
    held = ", ".join(f"{owner} {size(count)}" for owner, count in moment.held.items() if count > 0)
    return Text(f"at the peak: {held}", overflow="fold")


def _timeline(moments: tuple[Moment, ...]) -> Text:
    """The total over the step; below it, where the backward begins, and the range of totals."""
    totals = [moment.total for moment in moments]
    line = sparkline(totals, _LINE)
    turn = next((i for i, m in enumerate(moments) if m.phase == "backward"), len(moments))
    cells = turn * len(line) // len(moments)
    below = "forward".ljust(cells)[:cells] + "│backward" if turn < len(moments) else "forward"
    ends = (
        f"held over the step: {size(min(totals))} to {size(max(totals))}, not to the scale of time"
    )
    return Text(f"{line}\n{below}\n{ends}")


def _beside(report: Facts, plain: Plain) -> list[Part]:
    """A table that compares the step with one on labels alone."""
    rows = []
    if report.flops is not None:
        rows.append(("FLOPs", operations, report.flops.total, plain.flops))
    if report.memory is not None:
        memory = report.memory
        rows.append(("peak memory", size, memory.peak, plain.peak))
        rows.append(("gradients", size, memory.gradients, plain.gradients))
        rows.append(("saved", size, memory.saved, plain.saved))
        rows.append(("head", size, memory.head, plain.head))
    columns = ("", "labels alone", "distillation", "ratio")
    made = table("Beside plain training of the same student", *columns, right=columns[1:])
    for name, show, ours, theirs in rows:
        row(made, name, show(theirs), show(ours), ratio(ours, theirs))
    return [made] if rows else []
