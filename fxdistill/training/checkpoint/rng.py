"""The states of random number generators: of Python, numpy where it is imported, torch and CUDA."""

import random
import sys
from typing import Any

import torch
from torch import Tensor

from fxdistill.training.checkpoint import tree


def captured() -> Any:
    """The states now, as JSON. Nothing is drawn."""
    states: dict[str, Any] = {"python": random.getstate(), "torch": _bytes(torch.get_rng_state())}
    if (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, *rest = numpy.random.get_state()
        states["numpy"] = (kind, keys.tolist(), *rest)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = [_bytes(state) for state in torch.cuda.get_rng_state_all()]
    return tree.encode(states, tree.no_tensors, "random states")


def restore(saved: Any) -> None:
    """Go on from these states; those of a library or a device that is not here are left out."""
    states = tree.decode(saved, {})
    random.setstate(states["python"])
    torch.set_rng_state(_tensor(states["torch"]))
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in states:
        kind, keys, *rest = states["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    if torch.cuda.is_available():
        here = states.get("cuda", ())[: torch.cuda.device_count()]
        for device, state in enumerate(here):
            torch.cuda.set_rng_state(_tensor(state), device)


def _bytes(state: Tensor) -> bytes:
    return bytes(state.cpu().tolist())


def _tensor(state: bytes) -> Tensor:
    return torch.tensor(list(state), dtype=torch.uint8)
