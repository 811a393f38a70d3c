"""How the demo shows several trainings side by side: as a table, as a plot, and as JSON."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from figures import plt, show, spread
from rich import box
from rich.table import Table

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

    def steps_to(self, loss: float) -> float:
        """After how many steps it is as low, between two points of the curve on a straight line.

        It is infinite where the curve never comes so low.
        """
        before, higher = self.curve[0]
        for step, lower in self.curve:
            if lower <= loss:
                share = (higher - loss) / (higher - lower) if step > before else 0.0
                return before + share * (step - before)
            before, higher = step, lower
        return float("inf")


# A way of learning, with a run for each seed; seeds come in the same order in every way.
Ways = dict[str, list[Run]]


def steps_to_first(ways: Ways, name: str) -> list[float]:
    """Seed by seed: how many steps it takes to where the first way ends."""
    first = next(iter(ways.values()))
    return [run.steps_to(goal.heldout) for run, goal in zip(ways[name], first, strict=True)]


def table(ways: Ways, teacher: Run) -> Table:
    """Where each way ended, when it was where the first one ended, and what a step cost."""
    first, goals = next(iter(ways.items()))
    of = f"{len(goals)} seeds" if len(goals) > 1 else "one seed"
    title = f"Held-out loss after {goals[0].steps} steps, in nats per token, of {of}"
    result = Table("learned from", title=title, box=box.SIMPLE_HEAD)
    for column in ("loss", f"vs\n{first}", f"meets\n{first}", "ms/step"):
        result.add_column(column, justify="right")
    for name, runs in ways.items():
        heldout = [run.heldout for run in runs]
        change = mean(heldout) - mean(goal.heldout for goal in goals)
        compared = (f"{change:+.3f}", at_step(ways, name)) if name != first else ("", "")
        rate = 1000 * mean(run.seconds / run.steps for run in runs)
        result.add_row(name, show(heldout), *compared, f"{rate:.0f}")
    name, rate = f"(the teacher, {teacher.steps} steps)", 1000 * teacher.seconds / teacher.steps
    result.add_row(name, f"{teacher.heldout:.3f}", "", "", f"{rate:.0f}")
    return result


def at_step(ways: Ways, name: str) -> str:
    """``steps_to_first``, as mean and spread."""
    steps = steps_to_first(ways, name)
    return f"{mean(steps):.0f}" + (f" ± {spread(steps):.0f}" if len(steps) > 1 else "")


def save_plot(path: Path, ways: Ways, teacher: Run) -> None:
    """For each way the mean curve, a band as wide as the spread, and where it meets the first."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    goal = mean(run.heldout for run in next(iter(ways.values())))
    bottom = teacher.heldout + 0.02  # where texts stand, on the teacher's line
    meets: list[tuple[float, str, str]] = []
    for (name, runs), colour in zip(ways.items(), COLOURS, strict=True):
        steps = [step for step, _ in runs[0].curve]
        losses = [[run.curve[i][1] for run in runs] for i in range(len(steps))]
        means, spreads = [mean(at) for at in losses], [spread(at) for at in losses]
        label = f"{name}: {show(losses[-1])}"
        axes.plot(steps, means, "o-", color=colour, markersize=4, label=label)
        low = [m - s for m, s in zip(means, spreads, strict=True)]
        high = [m + s for m, s in zip(means, spreads, strict=True)]
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        if (reached := mean(steps_to_first(ways, name))) < steps[-1]:
            axes.vlines(reached, bottom, goal, color=colour, linestyle=":", linewidth=1)
            meets.append((reached, f" step {at_step(ways, name)} ", colour))
    axes.axhline(goal, color=COLOURS[0], linestyle=":", linewidth=1)
    for i, (reached, text, colour) in enumerate(sorted(meets)):  # lines lie close: text left, right
        side = "right" if i == 0 else "left"
        axes.text(reached, bottom, text, ha=side, va="bottom", color=colour)
    level = f"the teacher, after {teacher.steps} steps of its own: {teacher.heldout:.2f}"
    axes.axhline(teacher.heldout, color="black", linestyle="--", linewidth=1, label=level)
    axes.set(xlabel="training step of the student", ylabel="held-out loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def save_json(path: Path, ways: Ways, teacher: Run, **about: Any) -> None:
    """Everything the table and the plot show, and what it was made with."""
    results: dict[str, Any] = {"teacher": {**asdict(teacher), "heldout": teacher.heldout}}
    for name, runs in ways.items():
        heldout = [run.heldout for run in runs]
        # JSON has no infinity: a run that never gets there has null.
        steps = [s if s < float("inf") else None for s in steps_to_first(ways, name)]
        seeds = [{**asdict(run), "heldout": run.heldout} for run in runs]
        found = {"heldout": mean(heldout), "spread": spread(heldout), "steps_to_first": steps}
        results[name] = {**found, "seeds": seeds}
    path.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")
