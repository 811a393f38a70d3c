"""What holds for every test: fixed seeds, one thread, a compiler without memory, no network."""

import os
import random
import sys
import tempfile

import numpy as np
import pytest
import torch


def pytest_configure(config):
    # A test that asks a hub for weights fails at once.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    # Compiled graphs are cached on disk. A change to a pass must never be judged by a graph that
    # the old pass made, so each run starts with an empty cache: some 4 s for the C++ headers, then
    # 2 s a graph. To keep one between runs, name its folder in the environment. Inductor names the
    # one of all runs there when it is imported, so nothing that does so is imported above.
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        cache = tempfile.TemporaryDirectory(prefix="fxdistill-", ignore_cleanup_errors=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name
        config.add_cleanup(cache.cleanup)

    # Toy tensors are slower on two threads than on one, and a sum keeps its order.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _terms_of_regional_mode(request, monkeypatch):
    from lowering import lower_terms_eagerly  # which imports Inductor

    if request.node.get_closest_marker("inductor") is None:
        lower_terms_eagerly(monkeypatch.setattr)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Forget what other tests compiled, so that counts of graphs do not depend on the order."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
