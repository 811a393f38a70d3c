"""Distil a small Llama three ways on real text, and see what each kind of loss is worth.

A teacher is trained once on the source of Python's standard library. Then a student half as deep
learns in three ways: from the labels; from the teacher's logits too; and from what the teacher's
attention and MLP layers put out as well. Each way has three seeds; within a seed, all ways start
from the same weights and see the same batches.

What one learns here: how ``fxdistill.wrap`` makes student, teacher and losses one module that is
called like a model, how layers are paired by name, and that the training loop stays one's own.

    python examples/distill_language_model.py            # about 10 minutes on 2 cores
    python examples/distill_language_model.py --smoke    # seconds; nothing is learned
"""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from comparison import Run, save_json, save_plot, table
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from stdlib_text import Text, batches, cached, load, windows
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxdistill


@dataclass(frozen=True)
class Settings:
    """Sizes that a CPU trains in minutes."""

    vocabulary: int = 2048
    width: int = 128
    teacher_layers: int = 6
    student_layers: int = 3
    teacher_steps: int = 1000
    student_steps: int = 300
    batch: int = 16
    length: int = 64
    heldout_windows: int = 256
    learning_rate: float = 4e-3


SMOKE = Settings(
    vocabulary=512,
    width=32,
    teacher_layers=2,
    student_layers=1,
    teacher_steps=20,
    student_steps=20,
    batch=4,
    heldout_windows=8,
)


def recipes(settings: Settings) -> dict[str, dict]:
    """The three ways, as arguments of ``wrap``. Student layer i has teacher layer 2i + 1."""
    pairs = {
        f"model.layers.{i}.{part}": f"model.layers.{2 * i + 1}.{part}"
        for i in range(settings.student_layers)
        for part in ("self_attn", "mlp")
    }
    return {
        "labels": {"logit_loss": None},
        "labels, logits": {},
        "labels, logits, activations": {"mapping": pairs, "feature_weight": 0.1},
    }


def llama(settings: Settings, layers: int, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights, the same ones for the same seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.width,
        intermediate_size=3 * settings.width,
        num_hidden_layers=layers,
        num_attention_heads=settings.width // 32,
        max_position_embeddings=settings.length,
        initializer_range=0.06,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Lesson:
    """What all trainings share, so that they differ in their losses and nothing else."""

    settings: Settings
    text: Text
    progress: Progress
    folder: Path

    def train(self, name: str, run: nn.Module, model: nn.Module, steps: int, seed: int) -> Run:
        """A plain training loop: ``run`` is ``model`` itself, or a distiller around it."""
        s = self.settings
        optimizer = torch.optim.AdamW(run.parameters(), betas=(0.9, 0.95), fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, s.learning_rate, steps, pct_start=0.1, cycle_momentum=False
        )
        data = batches(self.text.train, s.batch, s.length, steps, seed)
        curve, seconds = [], 0.0
        for step, ids in enumerate(self.progress.track(data, steps, description=name), start=1):
            start = perf_counter()
            out = run(input_ids=ids, labels=ids)
            out.loss.backward()
            nn.utils.clip_grad_norm_(run.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            seconds += perf_counter() - start
            if step % (steps // 10) == 0:
                curve.append((step, self.heldout_loss(model)))
        return Run(curve, seconds)

    @torch.no_grad()
    def heldout_loss(self, model: nn.Module) -> float:
        """Nats per token on files that nobody trained on. It is the plain model that runs here."""
        model.eval()
        s = self.settings
        heldout = windows(self.text.heldout, s.heldout_windows, s.length)
        losses = [model(input_ids=ids, labels=ids).loss for ids in heldout.split(32)]
        model.train()
        return torch.stack(losses).mean().item()

    def teacher(self) -> tuple[nn.Module, Run]:
        """The teacher, from the folder if one with the same settings was trained before."""
        s = self.settings
        model = llama(s, s.teacher_layers, seed=0)

        def make() -> dict:
            run = self.train("teacher", model, model, s.teacher_steps, seed=0)
            return {"weights": model.state_dict(), "run": asdict(run)}

        own = {key: value for key, value in asdict(s).items() if "student" not in key}
        name = hashlib.sha256(f"{own} {model.config} {self.text.digest}".encode()).hexdigest()[:12]
        saved = cached(self.folder / f"teacher-{name}.pt", make)
        model.load_state_dict(saved["weights"])
        return model, Run(**saved["run"])

    def student(
        self, name: str, seed: int, teacher: nn.Module, recipe: dict, compile: bool | dict
    ) -> Run:
        """A student, whose first weights and batches are those of the seed, whatever the recipe."""
        s = self.settings
        model = llama(s, s.student_layers, seed + 1)  # the teacher started from seed 0
        distiller = fxdistill.wrap(model, teacher, **recipe, compile=compile)
        ids = windows(self.text.train, s.batch, s.length)
        start = perf_counter()
        distiller.warmup(input_ids=ids, labels=ids)  # or the first step would compile
        compile_seconds = perf_counter() - start
        run = self.train(f"{name}, seed {seed}", distiller, model, s.student_steps, seed + 1)
        return replace(run, compile_seconds=compile_seconds)

    def report(self, teacher: nn.Module, recipe: dict, compile: bool | dict) -> None:
        """What a step will need, before it runs."""
        s = self.settings
        distiller = fxdistill.wrap(
            llama(s, s.student_layers, seed=1), teacher, **recipe, compile=compile
        )
        ids = windows(self.text.train, s.batch, s.length)
        report = distiller.report(input_ids=ids, labels=ids)
        self.progress.console.print(report)
        report.to_html(self.folder / "report.html")


def main(argv: Sequence[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(argv)
    settings = SMOKE if options.smoke else Settings()
    seeds = options.seeds[:1] if options.smoke else options.seeds
    compile = options.compile and ({"backend": "aot_eager"} if options.smoke else True)

    # Sizes this small gain little from a second thread, and lose much when another program has the
    # second core: every operator would wait for it.
    torch.set_num_threads(1)
    start = perf_counter()
    text = load(options.out, settings.vocabulary)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as progress:
        lesson = Lesson(settings, text, progress, options.out)
        teacher, teacher_run = lesson.teacher()
        lesson.report(teacher, list(recipes(settings).values())[-1], compile)
        ways = {
            name: [lesson.student(name, seed, teacher, recipe, compile) for seed in seeds]
            for name, recipe in recipes(settings).items()
        }
    about = {
        "settings": {**asdict(settings), "seeds": seeds},
        "torch": torch.__version__,
        "seconds": perf_counter() - start,
    }
    save_json(options.out / "distill_language_model.json", ways, teacher_run, **about)
    save_plot(options.out / "distill_language_model.png", ways, teacher_run)
    progress.console.print(table(ways, teacher_run))
    progress.console.print(
        f"{about['seconds']:.0f} s in all; report, plot and numbers are in {options.out}/"
    )


if __name__ == "__main__":
    main()
