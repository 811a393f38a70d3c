"""How long a process takes to its first step: with empty caches, and with those of another process.

    python benchmarks/second_process.py               # Llama of 4 layers from 8, CPU

Each round starts processes in turns: "first" with an empty cache of its own, then "second" with
what it left, for fxdistill and for hooks + `torch.compile` (see features.py), on the same pair. A
step is forward and backward. "step" is the first step alone; "process" is everything from the start
of Python to the end of that step, imports and the making of the models included. "cpu" is the time
that processors worked for the process, which other work on the machine changes less.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

KINDS = ("one graph", "regional", "hooks")
WHAT = ("step", "process", "cpu")
SIZES = ("vocabulary", "batch", "length", "width", "layers")


def child(o: argparse.Namespace) -> None:
    """One process: make the models, take one step, print the seconds since its start."""
    import warnings

    import torch
    from features import Hooked
    from llama import llama
    from torch._dynamo.utils import counters

    import fxdistill

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student, teacher = llama(o, o.width, o.layers), llama(o, 2 * o.width, 2 * o.layers)
    ids = torch.randint(o.vocabulary, (o.batch, o.length))
    pairs = [
        (f"model.layers.{i}.{part}", f"model.layers.{2 * i + 1}.{part}")
        for i in range(o.layers)
        for part in ("self_attn", "mlp")
    ]
    if o.child == "hooks":
        hooked = torch.compile(Hooked(student, teacher, pairs), fullgraph=True)

        def step() -> None:
            hooked(ids).backward()
    else:
        matches = [fxdistill.Match(s, t, project="auto") for s, t in pairs]
        compile = "regional" if o.child == "regional" else True
        distiller = fxdistill.wrap(student, teacher, matches, compile=compile)

        def step() -> None:
            distiller(input_ids=ids, labels=ids).loss.backward()

    begun = time.time()
    step()
    ended = time.time()
    found = dict(counters["aot_autograd"])
    times = {"step": ended - begun, "process": ended - o.started, "cpu": cpu_seconds()}
    print(json.dumps({**times, "counters": found}))


def cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def run(o: argparse.Namespace, kind: str, cache: str) -> dict[str, float]:
    """Run one process and return what it printed last."""
    arguments = ["--child", kind, "--started", str(time.time())]
    arguments += [f"--{name}={getattr(o, name)}" for name in SIZES]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(o: argparse.Namespace) -> list[dict[str, dict[str, float]]]:
    """The medians of every kind of process in every round."""
    rounds = []
    for _ in range(o.rounds):
        found: dict[str, list[dict[str, float]]] = {}
        with tempfile.TemporaryDirectory() as folder:
            for which in ("first", *["second"] * o.seconds):
                for kind in o.kinds:
                    told = run(o, kind, str(Path(folder) / kind.replace(" ", "_")))
                    print(kind, which, told, flush=True)
                    found.setdefault(f"{kind}, {which}", []).append(told)
        rounds.append({name: medians(tolds) for name, tolds in found.items()})
    return rounds


def medians(tolds: list[dict[str, float]]) -> dict[str, float]:
    return {what: statistics.median(told[what] for told in tolds) for what in WHAT}


def table(rounds: list[dict[str, dict[str, float]]], what: str) -> Table:
    """Medians over the rounds, and ratios to the first process and to the hooks' second one."""
    made = Table(f"{what} of", "s", "of its first", "of the hooks'")
    for name in rounds[0]:
        kind, which = name.split(", ")
        cells = [f"{statistics.median(r[name][what] for r in rounds):.1f}"]
        for other in (f"{kind}, first", f"hooks, {which}"):
            ratios = sorted(r[name][what] / r[other][what] for r in rounds if other in r)
            spread = f"({ratios[0]:.2f}-{ratios[-1]:.2f})" if ratios else ""
            cells.append(f"{statistics.median(ratios):.2f} {spread}" if ratios else "")
        made.add_row(name, *cells)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4, help="of the student")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=1, help="second processes in each round")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.child:
        child(o)
    else:
        rounds = measured(o)
        Console(width=100).print(vars(o), *(table(rounds, what) for what in WHAT))


if __name__ == "__main__":
    main()
