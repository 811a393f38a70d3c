"""What a report says, as data: every face of it (terminal, JSON, HTML) shows these values.

Sizes are bytes, costs are floating point operations (a multiplication and an addition are two), of
one step (forward and backward of one batch) on one device; on a mesh, on one rank.

``SCHEMA`` is the version of the JSON form. A field that is added makes it a new minor version, one
that goes or changes its meaning a new major one; docs/report.md describes each.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

SCHEMA = "1.2"


@dataclass(frozen=True)
class Value:
    """A tensor of the step."""

    shape: tuple[int, ...]
    dtype: str
    placements: tuple[str, ...] = ()  # of a DTensor, one for each dimension of its mesh

    def __str__(self) -> str:
        """Shape, type and placements on one line."""
        placed = f" {', '.join(self.placements)}" if self.placements else ""
        return f"[{', '.join(map(str, self.shape))}] {self.dtype}{placed}"


@dataclass(frozen=True)
class Pair:
    """A student's value and the teacher's that it is to be like.

    ``student`` and ``teacher`` are module paths with their ports, their roles what structure shows
    ("mixer", "mlp", "block", ...; empty where it shows nothing); their values are ``None`` where
    the step was not captured.
    """

    name: str
    student: str
    teacher: str
    loss: str
    weight: float
    between: str = ""  # projection and layouts
    student_value: Value | None = None
    teacher_value: Value | None = None
    student_role: str = ""
    teacher_role: str = ""
    projection: str = ""  # of the student's value: its class and widths
    student_model: str = "student"  # whose values these are
    teacher_model: str = "teacher"


@dataclass(frozen=True)
class TermLine:
    """A term of the total; its weight is λ of the formula."""

    name: str
    loss: str
    weight: float


@dataclass(frozen=True)
class Change:
    """A number before and after a pass."""

    before: int
    after: int


@dataclass(frozen=True)
class PassLine:
    """What one pass did to a graph; ``flops`` and ``bytes`` are those of all its nodes.

    ``graph`` is what it worked on: "teacher" or "student" alone, "joint" for both with all terms,
    "backward" for that with its gradients, "terms" where the models run as they are.
    """

    name: str
    graph: str
    level: str  # "captured": one forward; "joint": forward and backward
    changed: bool
    nodes: Change
    flops: Change | None
    bytes: Change | None
    exposed: tuple[str, ...]
    remarks: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class BlockLine:
    """A part of a tower, in the order of the model: a repeated block, or what is beside those.

    A module that holds blocks is a part too, of which what is its own counts: the model itself has
    an empty path. ``kinds`` are the mixers and MLPs that structure shows, with their paths.
    ``backward`` is 0 in a frozen teacher.
    """

    path: str
    kinds: tuple[tuple[str, str], ...]
    parameters: int
    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class TowerFacts:
    """One of the models, or the projections."""

    name: str
    model: str
    parameters: int
    trainable: int
    bytes: int  # of parameters and buffers, on this device
    dtypes: tuple[str, ...]
    training: bool
    blocks: tuple[BlockLine, ...] = ()
    devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Flops:
    """Floating point operations of a step, by what they are for.

    ``losses`` are the terms', forward and backward, with the heads where those are fused with them;
    ``again`` is what the backward does a second time.
    """

    teacher: int
    forward: int
    backward: int
    losses: int
    projections: int
    again: int
    total: int


@dataclass(frozen=True)
class Moment:
    """What is allocated while one operator runs: bytes by owner.

    The owners are "weights", "teacher", "student", "taps", "head", "losses", "gradients".
    """

    phase: str  # "forward" or "backward"
    at: str  # the block that runs, or the part of the step
    held: dict[str, int]

    @property
    def total(self) -> int:
        """All owners together."""
        return sum(self.held.values())


@dataclass(frozen=True)
class Memory:
    """Bytes that a step needs, before it is run.

    ``peak`` is weights, and all that is alive with them at the worst moment; an optimizer's states
    come on top of it. ``timeline`` is thinned, and holds the worst moment.
    """

    weights: dict[str, int]  # by tower, buffers with them
    gradients: int
    optimizers: dict[str, int]  # states, by optimizer
    saved: int  # what the forward leaves for the backward, with no parameters or inputs
    taps: int  # matched values of both towers, the most at one moment
    head: int  # logits, or what the fused head holds in place of them, the most at one moment
    transient: int  # at the peak: neither weights, nor gradients, nor saved
    peak: int
    peak_at: str
    timeline: tuple[Moment, ...]


@dataclass(frozen=True)
class Plain:
    """The same student trained on labels alone, its logits made: what distillation adds to.

    Its parts mean what those of ``Memory`` do.
    """

    flops: int
    peak: int
    gradients: int = 0
    saved: int = 0
    head: int = 0
    transient: int = 0


@dataclass(frozen=True)
class Collective:
    """What crosses ranks: whose, which, how often in a step, and the bytes it returns on a rank."""

    owner: str  # "student", "teacher", or "terms"
    kind: str
    times: int
    bytes: int


@dataclass(frozen=True)
class Event:
    """Something that happened while graphs were made: "capture", "recompile", "fallback"."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Cast:
    """Values that change their type within a tower."""

    owner: str
    before: str
    after: str
    times: int


@dataclass(frozen=True)
class Facts:
    """What a report knows of a step; ``stopped`` says what stood in the way of knowing more.

    A part that could not be known is ``None``, or empty.
    """

    schema: str
    fxdistill: str
    torch: str
    mode: str
    backend: str
    mesh: dict[str, int]  # ranks by dimension; empty on one device
    inputs: dict[str, Value]
    towers: tuple[TowerFacts, ...]
    pairs: tuple[Pair, ...]
    terms: tuple[TermLine, ...]
    passes: tuple[PassLine, ...] = ()
    nodes: dict[str, int] = dataclasses.field(default_factory=dict)  # of the one graph, by section
    flops: Flops | None = None
    memory: Memory | None = None
    plain: Plain | None = None
    collectives: tuple[Collective, ...] = ()
    events: tuple[Event, ...] = ()
    casts: tuple[Cast, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    stopped: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        found: dict[str, Any] = json.loads(self.to_json())
        return found

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON, keys in the order of the fields."""
        return json.dumps(as_json(self), indent=indent, allow_nan=False)


def as_json(value: Any) -> Any:
    """Dataclasses as dictionaries; a number that is not finite, which JSON lacks, as a text."""
    if dataclasses.is_dataclass(value):
        return {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: as_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
