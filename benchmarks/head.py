"""The fused vocabulary head against logits that exist: time and peak memory, in one run.

    python benchmarks/head.py                       # T=2048, D=256/512, V=32000, fp32, CPU or GPU
    python benchmarks/head.py --vocabulary 128000
    python benchmarks/head.py --device cuda --dtype bfloat16 --tokens 16384 --width 4096 \
        --teacher-width 4096 --vocabulary 128256

Forward KL plus cross entropy, forward and backward. Times are interleaved: every round runs every
version once, and a ratio is taken within a round; the median of the ratios is shown with the
smallest and the largest. Peak memory is what the allocator hands out beyond inputs and gradients:
on a CPU by the profiler's events, on a GPU by its statistics.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fxdistill.losses import cross_entropy, forward_kl, vocab_loss

Step = Callable[[], None]


def operands(o: argparse.Namespace) -> dict[str, Tensor]:
    g = torch.Generator(o.device).manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(*shape, generator=g, device=o.device) * scale
        return x.to(getattr(torch, o.dtype))

    made = {
        "student_hidden": random(o.tokens, o.width),
        "student_weight": random(o.vocabulary, o.width, scale=0.02),
        "teacher_hidden": random(o.tokens, o.teacher_width),
        "teacher_weight": random(o.vocabulary, o.teacher_width, scale=0.02),
        "labels": torch.randint(0, o.vocabulary, (o.tokens,), generator=g, device=o.device),
    }
    made["student_hidden"].requires_grad_()
    made["student_weight"].requires_grad_()
    return made


def unfused(student_hidden, student_weight, teacher_hidden, teacher_weight, labels):
    s, t = student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T
    return forward_kl(s, t) + cross_entropy(s, labels)


def fused(chunk: int | None) -> Callable[..., Tensor]:
    def loss(**x: Tensor) -> Tensor:
        return vocab_loss(**x, label_weight=1.0, chunk_tokens=chunk).loss

    return loss


def products(student_hidden, student_weight, teacher_hidden, teacher_weight, labels):
    """The four bare matrix products that any version needs, and nothing else."""
    with torch.no_grad():
        s = student_hidden @ student_weight.T
        teacher_hidden @ teacher_weight.T
        s @ student_weight
        s.T @ student_hidden


def versions(o: argparse.Namespace) -> dict[str, Step]:
    x = operands(o)

    def step(loss: Callable[..., Tensor]) -> Step:
        def run() -> None:
            loss(**x).backward()
            x["student_hidden"].grad = x["student_weight"].grad = None

        return run

    compiled = torch.compile(unfused, fullgraph=True)
    inside = torch.compile(fused(o.chunk), fullgraph=True)
    return {
        "unfused, compiled": step(compiled),
        "fused": step(fused(o.chunk)),
        "fused, compiled": step(inside),
        "four products": lambda: products(**x),
    }


def synchronise(o: argparse.Namespace) -> None:
    if o.device == "cuda":
        torch.cuda.synchronize()


def seconds(step: Step, o: argparse.Namespace) -> float:
    synchronise(o)
    start = time.perf_counter()
    step()
    synchronise(o)
    return time.perf_counter() - start


def peak(step: Step, o: argparse.Namespace) -> int:
    """Bytes beyond what is there before the step, and beyond the two gradients."""
    gradients = (o.tokens + o.vocabulary) * o.width * getattr(torch, o.dtype).itemsize
    if o.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before - gradients
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes)) - gradients


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--teacher-width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--chunk", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    o = parser.parse_args()
    if o.threads:
        torch.set_num_threads(o.threads)
    steps = versions(o)
    for step in steps.values():
        step()
    rounds = [{name: seconds(step, o) for name, step in steps.items()} for _ in range(o.rounds)]
    first = next(iter(steps))
    memory = {name: peak(step, o) for name, step in steps.items() if name != "four products"}
    table = Table("version", "s", "time ratio", "peak MB", "memory ratio")
    results = {}
    for name in steps:
        ratios = sorted(r[name] / r[first] for r in rounds)
        middle = statistics.median(r[name] for r in rounds)
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        cells = ["", ""]
        if name in memory:
            cells = [f"{memory[name] / 1e6:.0f}", f"1/{memory[first] / memory[name]:.1f}"]
        table.add_row(name, f"{middle:.2f}", spread, *cells)
        results[name] = {"seconds": [r[name] for r in rounds], "peak": memory.get(name)}
    Console(width=100).print(vars(o) | {"torch": torch.__version__}, table)
    if o.json:
        o.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
