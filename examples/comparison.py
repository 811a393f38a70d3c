"""How the examples show several trainings side by side: as a table, as a plot, and as JSON."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
from rich import box
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#7f7f7f", "#0072b2", "#d55e00")  # apart for the colour-blind, too


@dataclass(frozen=True)
class Run:
    """One training: ``(step, held-out loss)`` along the way, and the seconds it took."""

    curve: list[tuple[int, float]]
    seconds: float
    compile_seconds: float = 0.0

    @property
    def steps(self) -> int:
        return self.curve[-1][0]

    @property
    def heldout(self) -> float:
        return self.curve[-1][1]


def table(runs: dict[str, Run], teacher: Run) -> Table:
    """Where each run ended, and how that compares with the first."""
    first = next(iter(runs))
    title = f"Held-out loss after {runs[first].steps} steps, in nats per token"
    result = Table("learned from", title=title, box=box.SIMPLE_HEAD)
    for column in ("loss", f"vs {first}", "ms/step", "train", "compile"):
        result.add_column(column, justify="right")
    for name, run in {**runs, f"(the teacher, {teacher.steps} steps)": teacher}.items():
        change = f"{run.heldout - runs[first].heldout:+.3f}" if name != first else ""
        rate = f"{1000 * run.seconds / run.steps:.0f}"
        times = f"{run.seconds:.0f} s", f"{run.compile_seconds:.0f} s"
        result.add_row(name, f"{run.heldout:.3f}", change, rate, *times)
    return result


def save_plot(path: Path, runs: dict[str, Run], teacher: Run) -> None:
    """A curve for each run, and the teacher's level."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for (name, run), colour in zip(runs.items(), COLOURS, strict=True):
        label = f"{name}: {run.heldout:.2f}"
        axes.plot(*zip(*run.curve, strict=True), "o-", color=colour, markersize=4, label=label)
    level = f"the teacher, after {teacher.steps} steps of its own: {teacher.heldout:.2f}"
    axes.axhline(teacher.heldout, color="black", linestyle="--", linewidth=1, label=level)
    axes.set(xlabel="training step of the student", ylabel="held-out loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def save_json(path: Path, runs: dict[str, Run], teacher: Run, **about: Any) -> None:
    """Everything the table and the plot show, and what it was made with."""
    everything = {"teacher": teacher, **runs}
    results = {name: {**asdict(run), "heldout": run.heldout} for name, run in everything.items()}
    path.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")
