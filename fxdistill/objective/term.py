"""The terms of an objective: each has a loss, the values that it compares, and a weight.

Each term names the models that its values come from. Any number of models may be compared.
"""

from dataclasses import dataclass, field
from typing import Literal

from fxdistill.losses.names import Compared, Kind, Loss, kind_of
from fxdistill.mapping.layout import Layout
from fxdistill.models.axes import ChannelAxis
from fxdistill.models.conventions import Stream
from fxdistill.models.tap import ATTENTION, Tap, Tower

PAIRS = "pairs"  # the name of the term of a loss that takes all pairs
LOGITS = Tap("", "logits")  # the logits that a model returns
GLOBAL_SETTINGS = ("logit_weight", "feature_weight", "label_weight", "temperature")
THRESHOLD = "threshold"  # the setting of an importance that has one


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
    keeps_samples: tuple[bool, bool] = (True, True)  # as the first axis
    of: tuple[Tower, Tower] = ("student", "teacher")
    constant: bool = False  # the second value is a target, though its model learns
    has_tokens: bool = True  # unless the match says that it has none
    said_tokens: bool = False  # the match says whose tokens the values have
    numbers: bool = False  # the values are known to be one number of each token, [B, L]
    seems_to_see: bool = False  # no more than its path says that it has none: the models tell
    watched: bool = True  # where no mask weighs the values, padding in them may count unseen
    channels_last: tuple[bool, bool] = (False, False)  # the values are maps [B, *places, C]
    # Values of three axes are [B, C, L]; None: their modules do not tell.
    channels_first: tuple[bool | None, bool | None] = (None, None)
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
    def is_open(self) -> bool:
        """Whether the values may have tokens, and the match does not say whose."""
        return (self.has_tokens or self.seems_to_see) and not self.said_tokens

    @property
    def said_arranged(self) -> bool:
        """Whether the match says whose tokens the values have behind its layouts, too."""
        return self.said_tokens and not any(self.pools_tokens)

    @property
    def taps(self) -> tuple[tuple[Tower, Tap], tuple[Tower, Tap]]:
        """The two values that the term reads, each with its model."""
        return (self.of[0], self.student), (self.of[1], self.teacher)


Target = Literal["mean", "logits", "each"]


@dataclass(frozen=True)
class LogitTerm:
    """``loss(student logits, target, *, temperature, weights)``, times ``share``.

    Several ``teachers`` are one target: the ``"mean"`` of their probabilities, by the teachers'
    weights; the plain mean of their ``"logits"``; or ``"each"`` is a target, and the term is the
    mean of the losses. ``share`` is the term's fraction of the logit weight.
    """

    loss: Loss
    name: str = "logits"
    student: Tower = "student"
    teachers: tuple[Tower, ...] = ("teacher",)
    target: Target = "mean"
    share: float = 1.0
    module: int | None = None
    constant: bool = False  # the target has no gradient, though its models learn

    @property
    def weighs(self) -> bool:
        """Whether its teachers have weights; students that teach each other all count alike."""
        return len(self.teachers) > 1 and self.target == "mean" and not self.constant


@dataclass(frozen=True)
class LabelTerm:
    """``loss(student logits, labels, *, weights)``, times its ``share`` of the label weight."""

    loss: Loss
    name: str = "labels"
    student: Tower = "student"
    share: float = 1.0
    module: int | None = None


@dataclass(frozen=True)
class HeadTerm:
    """Further logits of a student: ``tap``, through the module of that name if there is one.

    ``shift`` is how many places ahead they predict. Each of its losses has a setting, by its name,
    as its weight; ``target`` is the value of the teachers that the first compares with.
    """

    name: str
    tap: Tap
    shift: int = 1
    has_module: bool = False
    logits: LogitTerm | None = None
    labels: LabelTerm | None = None
    target: Tap = LOGITS
    pools: bool = False  # module="auto" has made its module
    channels: ChannelAxis | None = None  # the axis of the value that such a module reads
    student: Tower = "student"

    @property
    def terms(self) -> tuple[LogitTerm | LabelTerm, ...]:
        """The terms of the head."""
        return tuple(term for term in (self.logits, self.labels) if term is not None)

    @property
    def targets(self) -> tuple[tuple[Tower, Tap], ...]:
        """The values that it is compared with."""
        teachers = () if self.logits is None else self.logits.teachers
        return tuple((tower, self.target) for tower in teachers)
