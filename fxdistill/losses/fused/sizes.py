"""How many tokens a chunk has."""

from typing import NamedTuple

import torch
from torch import Tensor


class Sizes(NamedTuple):
    """What suits a kind of device."""

    budget: int  # bytes for the logits of a chunk, both towers together
    rows: int  # tokens that the body takes at a time; chunks are multiples of it


ON_CPU = Sizes(96 * 2**20, 16)
ELSEWHERE = Sizes(768 * 2**20, 256)  # by the sizes of weights on GPUs; not measured


def sizes_on(device: torch.device) -> Sizes:
    """The sizes for ``device``."""
    return ON_CPU if device.type == "cpu" else ELSEWHERE


def chunk_tokens_for(columns: int, itemsize: int, device: torch.device) -> int:
    """How many tokens of ``columns`` logits (both towers') fit the budget.

    160 at least: every chunk reads both weights, and reads and writes the weight's gradient.
    """
    budget, rows = sizes_on(device)
    return max(160, budget // (columns * itemsize) // rows * rows)


def size_of_chunks(chunk: int, h: Tensor) -> int:
    """``chunk``, or less to make chunks of about one size, rounded up to what the body takes."""
    tokens, rows = max(1, h.shape[0]), sizes_on(h.device).rows
    tokens = -(-tokens // -(-tokens // chunk))
    return -(-tokens // rows) * rows
