"""The number of tokens in a chunk."""

from typing import NamedTuple

import torch
from torch import Tensor


class Sizes(NamedTuple):
    """Sizes for one kind of device."""

    budget: int  # bytes for the logits of a chunk, of both models together
    rows: int  # tokens that the body takes at a time; chunks are multiples of it


# The body waits for all threads at eight places, which takes long when other work has the cores. So
# it takes no fewer tokens than its intermediates allow, of which two have the size of its logits.
ON_CPU = Sizes(52 * 2**20, 32)
ELSEWHERE = Sizes(768 * 2**20, 256)  # estimated from the sizes of weights on GPUs; not measured
LEAST = 160  # tokens of a chunk
BODY = 7  # values that an uncompiled body keeps alive for each token and vocabulary entry


def sizes_on(device: torch.device) -> Sizes:
    """The sizes for ``device``."""
    return ON_CPU if device.type == "cpu" else ELSEWHERE


def chunk_tokens_for(columns: int, itemsize: int, device: torch.device) -> int:
    """How many tokens fit the budget, with ``columns`` logits (of both models) each.

    It is at least ``LEAST``, because every chunk reads both weights, and reads and writes the
    gradient of the student's weight.
    """
    budget, rows = sizes_on(device)
    return max(LEAST, budget // (columns * itemsize) // rows * rows)


def size_of_chunks(chunk: int, h: Tensor) -> int:
    """``chunk``, or less so that chunks are about equal; a multiple of what the body takes."""
    tokens, rows = max(1, h.shape[0]), sizes_on(h.device).rows
    tokens = -(-tokens // -(-tokens // chunk))
    return -(-tokens // rows) * rows
