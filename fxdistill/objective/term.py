"""The terms of an objective: each has a loss, the values that it compares, and a weight.

Each term names the models that its values come from. Any number of models may be compared.
"""

from dataclasses import dataclass, field

from fxdistill.losses.names import Compared, Kind, Loss, kind_of
from fxdistill.mapping.layout import Layout
from fxdistill.models.conventions import Stream
from fxdistill.models.tap import ATTENTION, Tap, Tower

PAIRS = "pairs"  # the name of the term of a loss that takes all pairs
LOGITS = Tap("", "logits")  # the logits that a model returns
GLOBAL_SETTINGS = ("logit_weight", "feature_weight", "label_weight", "temperature")


@dataclass(frozen=True)
class Term:
    """One match: ``loss(student value, teacher value, weights)``, times ``weight``.

    ``of`` names the model that learns and the model that it is compared with.
    """

    name: str
    loss: Loss
    student: Tap
    teacher: Tap
    weight: float = 1.0
    stream: Stream = "tokens"
    projection: int | None = None
    layouts: tuple[Layout, Layout] = ((), ())
    # What the layouts do to tokens, stored so that tracing the step parses no pattern.
    keeps_tokens: bool = True
    pools_tokens: tuple[bool, bool] = (False, False)
    of: tuple[Tower, Tower] = ("student", "teacher")
    has_tokens: bool = True  # unless the match says that it has none
    said_tokens: bool = False  # the match says whose tokens the values have
    by_teacher: bool = False  # the tokens of the teacher's own inputs weigh the values
    compares: Compared = "shapes"  # what must agree in the two values
    weights: str | None = None  # the name of weights that the call brings
    module: int | None = None  # the index of a loss that is a module
    # Tracing asks this and not the loss: a step reads a loss that is a module from its arguments.
    kind: Kind = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", kind_of(self.loss))

    is_map: bool = False  # the values are maps of attention [B, heads, queries, keys]
    in_pairs: bool = False  # the loss takes this pair of values together with all others

    @property
    def of_attention(self) -> bool:
        """Whether the term compares how tokens attend, rather than values of tokens."""
        by_port = ATTENTION in (self.student.port, self.teacher.port)
        return by_port or self.kind.sees in ("attention", "whole maps")

    @property
    def taps(self) -> tuple[tuple[Tower, Tap], tuple[Tower, Tap]]:
        """The two values that the term reads, each with its model."""
        return (self.of[0], self.student), (self.of[1], self.teacher)


@dataclass(frozen=True)
class LogitTerm:
    """``loss(student logits, teacher logits, *, temperature, weights)``, times ``share``.

    ``share`` is the term's fraction of the logit weight.
    """

    loss: Loss
    name: str = "logits"
    student: Tower = "student"
    teacher: Tower = "teacher"
    share: float = 1.0
    module: int | None = None


@dataclass(frozen=True)
class LabelTerm:
    """``loss(student logits, labels, *, weights)``, times its ``share`` of the label weight."""

    loss: Loss
    name: str = "labels"
    student: Tower = "student"
    share: float = 1.0
    module: int | None = None
