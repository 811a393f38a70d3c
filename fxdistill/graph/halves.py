"""A step as AOTAutograd has cut it: a forward and a backward graph."""

from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True)
class Halves:
    """The forward and the backward graph of a step.

    The first ``outputs`` values that ``forward`` returns go to the caller. The others are saved for
    ``backward``, whose placeholders have the names of these values. ``inputs`` are the inputs that
    the step was cut for, with parameters and buffers, in the order of the placeholders of
    ``forward``. AOTAutograd may add states of random operators to the placeholders, or replace
    those of inputs that alias.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    outputs: int
    fuses: bool  # whether several operators run as one kernel, or each by itself
    inputs: tuple[Any, ...]
