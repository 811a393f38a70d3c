"""The settings of a step by name, out of the one vector that enters the graph."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Names(NamedTuple):
    """The settings behind the global ones, in the order of the vector: of matches and of heads.

    ``teachers`` are the names of the teachers that have weights: of several, as one target.
    """

    matches: tuple[str, ...]
    heads: tuple[str, ...] = ()
    teachers: tuple[str, ...] = ()


class StepWeights(NamedTuple):
    """The settings of a step as 0-d tensors; ``matches`` has one weight per match, in order.

    ``heads`` has the weights of heads' terms by name, ``teachers`` ``[K]`` those of teachers.
    """

    logits: Tensor
    features: Tensor
    labels: Tensor
    temperature: Tensor
    matches: tuple[Tensor, ...]
    heads: Mapping[str, Tensor]
    teachers: Tensor | None

    @classmethod
    def of(cls, settings: "Tensor | StepWeights", names: Names) -> "StepWeights":
        """Split the vector: ``GLOBAL_SETTINGS`` in order, then the settings of ``names``."""
        if isinstance(settings, StepWeights):  # of one who differentiates by each weight
            return settings
        logits, features, labels, temperature = settings[:4].unbind()
        count, end = len(names.matches), 4 + len(names.matches) + len(names.heads)
        own = settings[4:end].unbind()
        heads = dict(zip(names.heads, own[count:], strict=True))
        teachers = settings[end:] if names.teachers else None
        return cls(logits, features, labels, temperature, own[:count], heads, teachers)
