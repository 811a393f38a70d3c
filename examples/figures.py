"""How results are shown: as mean and spread, as a table, and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

import matplotlib
from rich import box
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from runs import Study

# Apart for the colour-blind, too: the seeds, their mean, what is only there to compare with.
SEED, MEAN, REFERENCE = "#0072b2", "#d55e00", "#555555"


def spread(values: Sequence[float]) -> float:
    """The standard deviation between seeds (n − 1); 0 of a single one."""
    return stdev(values) if len(values) > 1 else 0.0


def show(values: Sequence[float]) -> str:
    """Mean and spread, with as many digits as the spread has any use for."""
    if not values:
        return ""
    digits = 3 if abs(mean(values)) < 10 else 1
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {spread(values):.{digits}f}"


def table(study: "Study") -> Table:
    """A row for each way, references last and in brackets; a column for each measure."""
    title = f"{study.name}: mean ± standard deviation of {len(study.options.seeds)} seeds"
    table = Table("", title=title, box=box.SIMPLE_HEAD)
    for label in (*study.measures.values(), "seconds"):
        table.add_column(label, justify="right")
    for way in (*study.ways, *study.references):
        name = f"({way})" if way in study.references else way
        figures = [show(study.results[way].get(measure, [])) for measure in study.measures]
        table.add_row(name, *figures, f"{study.seconds[way]:.0f}" if way in study.seconds else "")
    return table


def picture(study: "Study", path: Path) -> None:
    """A panel for each measure, a row for each way: its seeds, their mean and spread."""
    size = (1.8 + 3.4 * len(study.measures), 1.3 + 0.36 * len(study.ways))
    figure, panels = plt.subplots(
        1, len(study.measures), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (measure, label) in zip(panels[0], study.measures.items(), strict=True):
        for row, way in enumerate(study.ways):
            if not (values := study.results[way].get(measure)):
                continue  # this way has no such part
            axes.plot(values, [row] * len(values), "o", color=SEED, mfc="none", ms=5)
            axes.errorbar(
                mean(values), row, xerr=spread(values), fmt="D", color=MEAN, ms=5, capsize=3
            )
        for reference in study.references:
            if values := study.results[reference].get(measure):
                text = f"{reference}: {show(values)}"
                axes.axvline(mean(values), color=REFERENCE, ls="--", lw=1, label=text)
                axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))
        better = "less is better" if measure in study.less else "more is better"
        key = "○ a seed, ◆ mean ± standard deviation"
        axes.set_xlabel(f"{label}, {better}\n{key}", fontsize=9)
        axes.set_yticks(range(len(study.ways)), study.ways, fontsize=9)
        axes.set_ylim(len(study.ways) - 0.5, -0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)
