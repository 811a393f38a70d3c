"""The same curve in every loop: 300 steps on the demo's text, by five loops.

    python benchmarks/loops.py
    python benchmarks/loops.py --steps 50 --compile

Every loop trains the same student from the same weights on the same batches with AdamW: a plain
loop, transformers' Trainer, Accelerate on one process and on two (DDP, half of every batch each),
and Lightning. What is printed of each is the largest relative difference of a step's loss from the
plain loop's, and the time of the run.
"""

import argparse
import json
import os
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

import fxdistill

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from distill_language_model import Settings, llama, recipes
from stdlib_text import batches, load

SETTINGS = Settings()
Rows = list[dict[str, Tensor]]


def rows_of(o: argparse.Namespace) -> Rows:
    """The demo's batches, row by row."""
    text = load(o.out, SETTINGS.vocabulary).train
    drawn = batches(text, SETTINGS.batch, SETTINGS.length, o.steps, SETTINGS.seed)
    return [{"input_ids": ids, "labels": ids} for batch in drawn for ids in batch]


def distilled(o: argparse.Namespace) -> fxdistill.Distiller:
    """The demo's student beside its teacher, which was not trained: only the loops are compared."""
    student = llama(SETTINGS, SETTINGS.student_layers, seed=1)
    teacher = llama(SETTINGS, SETTINGS.teacher_layers, seed=0)
    *_, (_, recipe) = recipes(SETTINGS).items()
    return fxdistill.wrap(student, teacher, **recipe, compile=o.compile)


def optimizer_of(distiller: fxdistill.Distiller) -> torch.optim.Optimizer:
    return torch.optim.AdamW(distiller.param_groups(), lr=SETTINGS.learning_rate / 4)


def plain(o: argparse.Namespace, rows: Rows) -> list[float]:
    distiller, found = distilled(o), []
    optimizer = optimizer_of(distiller)
    for batch in DataLoader(rows, SETTINGS.batch):
        out = distiller(**batch)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(out.loss.detach())
    return torch.stack(found).tolist()


class InOrder(Trainer):
    """Batches in order: all loops see the same."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> None:
        return None


def of_trainer(o: argparse.Namespace, rows: Rows) -> list[float]:
    distiller = distilled(o)
    arguments = TrainingArguments(
        str(o.out / "loops"),
        max_steps=o.steps,
        logging_steps=1,
        per_device_train_batch_size=SETTINGS.batch,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        log_level="error",
    )
    given = {"train_dataset": rows, "optimizers": (optimizer_of(distiller), None)}
    trainer = InOrder(model=distiller, args=arguments, **given)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def of_accelerate(o: argparse.Namespace, rows: Rows) -> list[float]:
    accelerator = Accelerator(cpu=True)
    distiller = distilled(o)
    loader = DataLoader(rows, SETTINGS.batch // accelerator.num_processes)
    prepared = accelerator.prepare(distiller, optimizer_of(distiller), loader)
    model, optimizer, loader = prepared
    found = []
    for batch in loader:
        out = model(**batch)
        accelerator.backward(out.loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(out.loss.detach())
    return torch.stack(found).tolist()


def on_two(o: argparse.Namespace, rows: Rows) -> list[float]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    path = o.out / "curve-of-two.json"
    mp.start_processes(_rank, (o, rows, port, path), nprocs=2, start_method="spawn")
    return json.loads(path.read_text())


def _rank(rank: int, o: argparse.Namespace, rows: Rows, port: int, path: Path) -> None:
    torch.set_num_threads(1)
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    found = of_accelerate(o, rows)
    if rank == 0:
        path.write_text(json.dumps(found))


class Distilled(lightning.LightningModule):
    def __init__(self, distiller: fxdistill.Distiller) -> None:
        super().__init__()
        self.distiller, self.seen = distiller, []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self.distiller(**batch).loss
        self.seen.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self.distiller)


def of_lightning(o: argparse.Namespace, rows: Rows) -> list[float]:
    module = Distilled(distilled(o))
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **off)
    trainer.fit(module, DataLoader(rows, SETTINGS.batch))
    return torch.stack(module.seen).tolist()


LOOPS: dict[str, Callable[[argparse.Namespace, Rows], list[float]]] = {
    "plain": plain,
    "Trainer": of_trainer,
    "Accelerate": of_accelerate,
    "Accelerate, 2 processes": on_two,
    "Lightning": of_lightning,
}


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    o = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows, wanted = rows_of(o), None
    table = Table("loop", "first loss", "last loss", "largest difference", "seconds")
    for name, loop in LOOPS.items():
        start = perf_counter()
        curve = torch.tensor(loop(o, rows), dtype=torch.float64)
        wanted = curve if wanted is None else wanted
        apart = ((curve - wanted) / wanted).abs().max()
        figures = f"{curve[0]:.6f}", f"{curve[-1]:.6f}", f"{apart:.1e}"
        table.add_row(name, *figures, f"{perf_counter() - start:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
