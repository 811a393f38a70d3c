"""Distil a plain Llama on two ranks, and get the losses of one process.

The teacher is a small one of the demo's, trained for a minute on the source of Python's standard
library. A student half as deep learns from it: labels, logits, and what each attention and MLP
layer puts out. Started by ``torchrun``, both models lie on a mesh, one more argument of
``fxdistill.wrap``; started by ``python``, there is none. All else is the same, and so are the
losses: sequences, heads, MLPs and the vocabulary are shared out, and no line of the model is.

    python examples/tensor_parallel.py
    torchrun --nproc-per-node 2 examples/tensor_parallel.py            # half of every layer each
    torchrun --nproc-per-node 2 examples/tensor_parallel.py --mesh dp  # half of every batch each
"""

import argparse
import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from distill_language_model import Lesson, Settings, llama
from rich.console import Console
from rich.progress import Progress
from stdlib_text import batches, load
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import fxdistill

SETTINGS = Settings(teacher_steps=60, heldout_windows=32)


def mesh_of_all_ranks(name: str) -> DeviceMesh | None:
    """Every process that torchrun started, in one dimension; ``None`` where it started none."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=(name,)) if ranks > 1 else None


def mine(ids: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """What this rank is given: its own samples along "dp", everyone's along "tp"."""
    if mesh is None or mesh.mesh_dim_names != ("dp",):
        return ids
    return ids.chunk(mesh.size())[mesh.get_local_rank()]


def places(model: nn.Module) -> str:
    """How much of the model this rank holds, and where the weights of one layer lie."""
    weights = dict(model.named_parameters())
    held = sum((w.to_local() if isinstance(w, DTensor) else w).numel() for w in weights.values())
    whole = sum(w.numel() for w in weights.values())
    lines = [f"This rank holds {held:,} of the student's {whole:,} weights. Of each layer:"]
    for name, w in model.get_submodule("model.layers.0").named_parameters():
        where = repr(w.placements[0]) if isinstance(w, DTensor) else "whole"
        lines.append(f"    {name:31} {' × '.join(map(str, w.shape)):>9}  {where}")
    return "\n".join(lines)


def train(distiller: fxdistill.Distiller, data: Iterable[Tensor], console: Console) -> None:
    """A training loop as ever, on any number of ranks."""
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=2e-3, betas=(0.9, 0.95))
    start = perf_counter()
    for step, ids in enumerate(data, start=1):
        loss = distiller(input_ids=ids, labels=ids).loss
        loss.backward()
        norm = distiller.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds, start = perf_counter() - start, perf_counter()
        console.print(f"step {step:3}   loss {loss:.6f}   norm {norm:.5f}   {seconds:5.2f} s")


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--layers", type=int, default=2, help="of the student; the teacher: twice")
    parser.add_argument("--mesh", choices=("tp", "dp"), default="tp")
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()

    torch.set_num_threads(1)
    mesh = mesh_of_all_ranks(options.mesh)
    console = Console(quiet=mesh is not None and mesh.get_rank() > 0, highlight=False)
    layers = {"student_layers": options.layers, "teacher_layers": 2 * options.layers}
    settings = dataclasses.replace(SETTINGS, **layers)
    text = load(options.out, settings.vocabulary)
    # From the disk, or trained here and now: the same one on every rank.
    teacher, _ = Lesson(settings, text, Progress(disable=True), options.out).teacher()
    student = llama(settings, settings.student_layers, seed=1)

    mapping = fxdistill.match(student, teacher)
    given = {"feature_weight": 0.1, "compile": options.compile}
    distiller = fxdistill.wrap(student, teacher, mapping, mesh=mesh, **given)
    console.print(places(student))
    data = batches(text.train, settings.batch, settings.length, options.steps, seed=1)
    train(distiller, (mine(ids, mesh) for ids in data), console)
    console.print(distiller.summary())
    if mesh is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
