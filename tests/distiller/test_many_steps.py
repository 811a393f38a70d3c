"""A long run whose shapes change: nothing grows, and nothing compiles after the first pass."""

import gc
import os
from pathlib import Path

import pytest
import torch
from torch._C._functorch import is_functorch_wrapped_tensor as is_wrapped
from torch._dynamo.utils import counters

import fxdistill
from toys import MAPPING, tokens, toy_pair

STEPS = 2000
SHAPES = [(2, 5), (3, 7), (4, 9), (2, 16), (3, 21), (5, 33), (4, 12), (6, 18), (7, 24), (8, 40)]


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def held():
    """The bytes of all tensors that Python can reach; what `torch.func` has wrapped has none."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor and not is_wrapped(x)]
    return sum(x.untyped_storage().nbytes() for x in tensors)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_two_thousand_steps_over_ten_shapes():
    """Only a long run shows a step that keeps something: a graph, a hook, a tensor, a row."""
    distiller = fxdistill.wrap(
        *toy_pair(), MAPPING, task="causal_lm", compile={"backend": "aot_eager"}
    )
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
    log = fxdistill.LossLog(every=STEPS)

    def run(steps):
        for step in range(steps):
            ids = tokens(*SHAPES[step % len(SHAPES)])
            out = distiller(ids, labels=ids)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            log.add(out)

    run(10 * len(SHAPES))  # the first pass compiles, those after it fill the allocator's pools
    kept, events = held(), list(distiller.journal.events)
    # Counting tensors makes a list of all objects, whose memory the process keeps: of millions, in
    # a process that ran other tests, many MB. So it comes before the one size, behind the other.
    before = resident()
    counters.clear()
    run(STEPS)
    gc.collect()
    grown = resident() - before
    assert not counters["stats"]
    assert not counters["frames"]
    assert distiller.journal.events == events
    assert held() - kept <= 64 * 2**10
    assert grown <= 4 * 2**20
