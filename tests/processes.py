"""Run a function on several ranks, as processes on 127.0.0.1, with an end to every wait."""

import datetime
import socket
import time
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lowering import lower_terms_eagerly

TIMEOUT = 240  # seconds for all of it
# Each test has processes of its own, forked from one that has imported these: 6 s a rank saved.
IMPORTED = (
    "fxdistill.distiller.wrap",
    "fxdistill.losses.fused.sharded_heads",
    "torch._inductor.compile_fx",
    "torch.distributed.tensor.parallel",
    "torch.testing",
    "transformers.models.llama.modeling_llama",
)


def run(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(rank, *args)`` on every rank; their results, or the first rank's traceback."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    queue = context.Queue()
    port = _free_port()
    processes = [
        context.Process(target=_rank, args=(rank, ranks, port, queue, function, args), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, error, result = _next(queue, processes)
            if error:
                raise AssertionError(f"rank {rank}:\n{error}")
            results[rank] = result
    finally:
        for process in processes:
            process.join(timeout=10 if len(results) == ranks else 0.1)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(ranks)]


def _rank(rank: int, ranks: int, port: int, queue: Any, function: Any, args: Any) -> None:
    torch.set_num_threads(1)
    lower_terms_eagerly()
    error, result = "", None
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=60),
        )
        result = function(rank, *args)
    except BaseException:  # what pytest raises is no Exception
        error = traceback.format_exc()
    queue.put((rank, error, result))
    if dist.is_initialized() and not error:
        dist.destroy_process_group()


def _next(queue: Any, processes: list[Any]) -> Any:
    """The next report; AssertionError where a process ended without one, or time is up."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        dead = [i for i, process in enumerate(processes) if process.exitcode]
        try:
            return queue.get(timeout=2)
        except Empty:
            if dead:
                raise AssertionError(f"ranks {dead} died without a report") from None
    raise AssertionError(f"no report within {TIMEOUT} s")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
