"""A step as AOTAutograd has cut it: what runs forward, and what runs backward."""

from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True)
class Halves:
    """A step as it was cut: what runs forward, and what runs backward.

    The first ``outputs`` values that ``forward`` returns are the caller's, the rest is saved for
    ``backward``, whose placeholders bear the names of the values. ``inputs`` are what the step was
    cut for, parameters and buffers among them, in the order of the placeholders of ``forward``; to
    these AOTAutograd may add states of random operators, or make others of inputs that alias.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    outputs: int
    fuses: bool  # whether what runs is these operators one by one, or kernels of several
    inputs: tuple[Any, ...]
