"""The settings of a step by name, out of the one vector that enters the graph."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from fxdistill.objective.importance import Importance


class Names(NamedTuple):
    """The settings behind the global ones, in the order of the vector: of matches and of heads.

    ``teachers`` are the names of the teachers that have weights: of several, as one target.
    ``importance`` is that of the objective if it has a threshold, which is a setting too.
    """

    matches: tuple[str, ...]
    heads: tuple[str, ...] = ()
    teachers: tuple[str, ...] = ()
    importance: Importance | None = None


class StepWeights(NamedTuple):
    """The settings of a step as 0-d tensors; ``matches`` has one weight per match, in order.

    ``heads`` has the weights of heads' terms by name, ``teachers`` ``[K]`` those of teachers.
    ``threshold`` is that of importance.
    """

    logits: Tensor
    features: Tensor
    labels: Tensor
    temperature: Tensor
    matches: tuple[Tensor, ...]
    heads: Mapping[str, Tensor]
    teachers: Tensor | None
    threshold: Tensor | None

    @classmethod
    def of(cls, settings: "Tensor | StepWeights", names: Names) -> "StepWeights":
        """Split the vector: ``GLOBAL_SETTINGS`` in order, then the settings of ``names``."""
        if isinstance(settings, StepWeights):  # of one who differentiates by each weight
            return settings
        logits, features, labels, temperature = settings[:4].unbind()
        count, end = len(names.matches), 4 + len(names.matches) + len(names.heads)
        own = settings[4:end].unbind()
        heads = dict(zip(names.heads, own[count:], strict=True))
        threshold = None if names.importance is None else settings[-1]
        teachers = settings[end : end + len(names.teachers)] if names.teachers else None
        return cls(logits, features, labels, temperature, own[:count], heads, teachers, threshold)
