"""Time and peak memory of a step, and versions interleaved in one run."""

import itertools
import statistics
import time
from collections.abc import Callable

import torch
from rich.table import Table

Step = Callable[[], None]


def seconds(step: Step, device: str = "cpu") -> float:
    """Wall time of one step."""
    synchronise(device)
    start = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak(step: Step, device: str = "cpu") -> int:
    """Bytes that the allocator holds at most, beyond what is there before the step."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes))


def interleaved(steps: dict[str, Step], rounds: int, device: str = "cpu") -> list[dict[str, float]]:
    """Seconds of every version in every round; each has run once before."""
    for step in steps.values():
        step()
    return [{name: seconds(step, device) for name, step in steps.items()} for _ in range(rounds)]


def comparison(
    rounds: list[dict[str, float]], memory: dict[str, int], first: str | None = None
) -> Table:
    """Medians, and ratios to the first version with their spread."""
    first = first or next(iter(rounds[0]))
    table = Table("version", "s", "time ratio", "peak MB", "memory ratio")
    for name in rounds[0]:
        ratios = sorted(r[name] / r[first] for r in rounds)
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        cells = ["", ""]
        if name in memory:
            cells = [f"{memory[name] / 1e6:.0f}", f"{memory[name] / memory[first]:.3f}"]
        table.add_row(name, f"{statistics.median(r[name] for r in rounds):.2f}", spread, *cells)
    return table
