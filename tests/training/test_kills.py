"""kill -9 at random points of a run, saves among them: no checkpoint is corrupt, every loss alike.

Processes are killed for good. Half of them end themselves at the n-th time that they touch the file
system below their folder, so that every rename and removal of a save has its turn; the others are
killed by a clock, in the middle of what they write, too.
"""

import multiprocessing as mp
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lives import Life

POINTS = 20


def seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def endless(folder: str, log: str, events: int | None) -> None:
    """Go on from the latest checkpoint and save each step, until killed."""
    torch.set_num_threads(1)
    seeded()
    run = Life()
    seeded()
    if list(Path(folder).glob("*-step-*")):
        step = run.load(folder).step
    else:
        step = 0
    if events is not None:
        sys.addaudithook(ending_after(events, folder))
    with Path(log).open("a", buffering=1) as lines:
        print("ready", file=lines)
        while True:
            (loss,) = run.steps(1)
            step += 1
            print("loss", step, loss.hex(), file=lines)
            run.save(folder, step=step)
            print("saved", step, file=lines)


def ending_after(events: int, folder: str) -> Any:
    """An audit hook: before it touches the folder for the n-th time, the process kills itself."""
    left = events

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if event in TOUCHES and args and str(args[0]).startswith(folder):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


TOUCHES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}


def killed(context: Any, folder: Path, log: Path, events: int | None, delay: float) -> None:
    """Start a run, and wait for its end, or end it."""
    log.write_text("")
    process = context.Process(target=endless, args=(str(folder), str(log), events))
    process.start()
    end = time.monotonic() + 60
    while "ready" not in log.read_text() and process.exitcode is None:
        assert time.monotonic() < end
        time.sleep(0.005)
    if events is None:
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_killed_at_any_point_a_run_goes_on(tmp_path: Path) -> None:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["lives", "fxdistill.distiller.wrap"])
    folder, log = tmp_path / "run", tmp_path / "log"
    chance, losses, last = random.Random(3), [], 0
    inside = 0  # kills that left something for the next save
    for point in range(POINTS):
        events = chance.randrange(90) if point % 2 else None
        killed(context, folder, log, events, chance.uniform(0, 0.15))
        lines = [line.split() for line in log.read_text().splitlines()]
        told = [line for line in lines if line[0] == "loss"]
        losses += [(int(step), float.fromhex(value)) for _, step, value in told]
        saved = [int(line[1]) for line in lines if line[0] == "saved"]
        last = max([last, *saved])
        if not folder.exists():
            continue
        whole = sorted(folder.glob("*-step-*"))
        for place in whole:  # every one that there is, named by the pointer or not
            Life().load(place)
        if whole:
            step = Life().load(folder).step
            assert step in (last, last + 1)  # the one before, or the new one
            last = step
        inside += any(path.suffix == ".part" for path in folder.iterdir())
    steps = max(step for step, _ in losses)
    assert inside >= 3
    assert steps >= 10
    seeded()
    run = Life()
    seeded()
    wanted = run.steps(steps)
    wrong = [(step, loss) for step, loss in losses if loss != wanted[step - 1]]
    assert not wrong
    Life().save(folder, step=steps)
    assert not list(folder.glob(".*"))
    assert len(list(folder.glob("*-step-*"))) == 2
