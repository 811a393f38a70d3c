"""What the examples share: options, a training loop, several seeds, and what they leave.

An example is a *study*: several ways to learn, each with the same seeds. Within a seed all ways
start from the same weights and see the same batches, so that their differences are those of the
ways. A study ends as a table, a picture, a JSON of everything, and a sentence for each way.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import figures
import torch
from figures import spread
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from stdlib_text import cached
from torch import Tensor, nn


def options(
    doc: str, argv: Sequence[str] | None, *, steps: int, teacher_steps: int = 0
) -> argparse.Namespace:
    """Read the command line of an example; ``--quick`` is for tests, and nothing is learned."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--steps", type=int, default=steps, help=f"of a student ({steps})")
    if teacher_steps:
        text = f"of the teacher ({teacher_steps})"
        parser.add_argument("--teacher-steps", type=int, default=teacher_steps, help=text)
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed, for tests")
    found = parser.parse_args(argv)
    if found.quick:
        found.seeds, found.steps = found.seeds[:1], 4
        if teacher_steps:
            found.teacher_steps = 4
    return found


class Study:
    """Trains, collects what was measured, and shows it. Use it as a context.

    Args:
        name: Of the files that are left: ``name.json`` and ``name.png``.
        options: What ``options`` returned.
        measures: What is measured, and how the axis calls it: ``{"accuracy": "accuracy (%)"}``.
        less: The measures of which less is better.
        sizes: What else the results were made with; it goes into the JSON.
    """

    def __init__(
        self,
        name: str,
        options: argparse.Namespace,
        measures: dict[str, str],
        *,
        less: Iterable[str] = (),
        sizes: dict[str, Any] | None = None,
    ) -> None:
        self.name, self.options, self.measures = name, options, measures
        self.less, self.sizes = set(less), sizes or {}
        self.results: dict[str, dict[str, list[float]]] = {}  # by way, by measure, a number a seed
        self.seconds: dict[str, float] = {}
        self.references: list[str] = []
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self.progress = Progress(*columns)

    def __enter__(self) -> "Study":
        # Sizes this small gain little from a second thread, and lose much when another program
        # has the second core: every operator would wait for it.
        self._threads, self._start = torch.get_num_threads(), perf_counter()
        torch.set_num_threads(1)
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self.progress.stop()
        torch.set_num_threads(self._threads)
        if kind is None:
            self._show()

    def train(
        self,
        way: str,
        loss: Callable[..., Tensor],
        parameters: Iterable[nn.Parameter],
        batches: Iterable[Any],
        steps: int,
        *,
        lr: float,
    ) -> None:
        """A plain loop: AdamW, one cycle of the learning rate, gradients clipped at 1.

        ``loss`` is called with each of the ``batches``: ``lambda b: distiller(**b).loss``, say.
        """
        parameters = list(parameters)
        optimizer = torch.optim.AdamW(parameters, lr=lr, fused=True)
        cycle = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, lr, max(steps, 2), pct_start=0.1, cycle_momentum=False
        )
        task, start = self.progress.add_task(way, total=steps), perf_counter()
        for batch in batches:
            loss(batch).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            cycle.step()
            optimizer.zero_grad()
            self.progress.advance(task)
        self.progress.remove_task(task)
        self.seconds[way] = self.seconds.get(way, 0.0) + perf_counter() - start

    def taught(
        self,
        way: str,
        model: nn.Module,
        loss: Callable[..., Tensor],
        batches: Iterable[Any],
        steps: int,
        *,
        lr: float,
        made_of: Any,
    ) -> None:
        """Train a teacher as ``train`` does, or find its weights where an earlier run left them.

        ``made_of`` is what decides, besides the model and the steps, how it comes out: its data.
        """

        def make() -> dict[str, Tensor]:
            self.train(way, loss, model.parameters(), batches, steps, lr=lr)
            return model.state_dict()

        key = hashlib.sha256(f"{model} {steps} {lr} {made_of}".encode()).hexdigest()[:12]
        model.load_state_dict(cached(self.options.out / f"teacher-{key}.pt", make))

    def note(self, way: str, *, reference: bool = False, **measured: float) -> None:
        """Note the figures of one seed; a ``reference`` is no way to learn: the teacher, say."""
        if reference and way not in self.references:
            self.references.append(way)
        for measure, value in measured.items():
            self.results.setdefault(way, {}).setdefault(measure, []).append(float(value))
        told = ", ".join(f"{measure} {value:.4g}" for measure, value in measured.items())
        self.progress.console.print(f"{way}: {told}", highlight=False)

    @property
    def ways(self) -> list[str]:
        """All but the references, in order; the others are compared with the first."""
        return [way for way in self.results if way not in self.references]

    def gains(self, way: str, measure: str) -> list[float]:
        """How much better it is than the first way, seed by seed."""
        sign = -1 if measure in self.less else 1
        pairs = zip(self.results[way][measure], self.results[self.ways[0]][measure], strict=True)
        return [sign * (mine - first) for mine, first in pairs]

    def sentences(self) -> list[str]:
        """What came out, in words, whatever it is."""
        measure, found = next(iter(self.measures)), []
        for way in self.ways[1:]:
            gains = self.gains(way, measure)
            better = sum(gain > 0 for gain in gains)
            gain = round(mean(gains), 9)  # gains that cancel out do so but for the last digits
            word = "the same as" if gain == 0 else "worse than" if gain < 0 else "better than"
            by = f"{abs(gain):.3g} ± {spread(gains):.2g}"
            found.append(
                f"{way}: {measure} {word} that of {self.ways[0]}, by {by}; "
                f"better in {better} of {len(gains)} seeds."
            )
        return found

    # ------------------------------------------------------------------ how it is shown

    def _show(self) -> None:
        seconds = perf_counter() - self._start
        self.options.out.mkdir(parents=True, exist_ok=True)
        path = self.options.out / self.name
        given = {k: v for k, v in vars(self.options).items() if k != "out"}
        about = {
            "example": self.name,
            "settings": {**given, **self.sizes},
            "torch": torch.__version__,
            "seconds": round(seconds, 1),
            "measures": self.measures,
            "references": self.references,
        }
        results = {
            way: {
                "seconds": self.seconds.get(way),  # of all seeds; none where it came from the disk
                **{m: {"mean": mean(v), "spread": spread(v), "seeds": v} for m, v in all_.items()},
            }
            for way, all_ in self.results.items()
        }
        everything = {**about, "results": results, "sentences": self.sentences()}
        path.with_suffix(".json").write_text(json.dumps(everything, indent=2) + "\n")
        figures.picture(self, path.with_suffix(".png"))
        console = self.progress.console
        console.print(figures.table(self))
        for sentence in self.sentences():
            console.print(sentence, highlight=False)
        console.print(f"{seconds:.0f} s in all; {path}.png and .json have the results.")
