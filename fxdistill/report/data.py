"""The data of a report: JSON has all of it, the terminal and the HTML page show most.

Sizes are in bytes, costs in floating point operations (a multiplication and an addition are two).
They are those of one step (forward and backward of one batch) on one device; on a mesh, on one
rank.

``SCHEMA`` is the version of the JSON form. Adding a field raises the minor version; removing a
field, or changing what it means, raises the major version. docs/report.md describes every field.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

SCHEMA = "1.3"


@dataclass(frozen=True)
class Value:
    """A tensor of the step."""

    shape: tuple[int, ...]
    dtype: str
    placements: tuple[str, ...] = ()  # of a DTensor: one for each dimension of its mesh

    def __str__(self) -> str:
        """The shape, dtype and placements on one line."""
        placed = f" {', '.join(self.placements)}" if self.placements else ""
        return f"[{', '.join(map(str, self.shape))}] {self.dtype}{placed}"


@dataclass(frozen=True)
class Pair:
    """A student's value and the teacher's value that it should match.

    ``student`` and ``teacher`` are module paths with ports. Their roles ("mixer", "mlp", "block",
    ...) are read off the models' structure, and are empty where it shows none. Their values are
    ``None`` if the step was not captured.
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
    projection: str = ""  # class and widths of the student's projection
    student_model: str = "student"  # the models by name
    teacher_model: str = "teacher"
    weighed_by: str = ""  # whose tokens, "samples", or "nothing"


@dataclass(frozen=True)
class TermLine:
    """A term of the total; its weight is the λ of the objective's formula."""

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
    """What one pass did to a graph; ``flops`` and ``bytes`` are sums over all of its nodes.

    ``graph`` names the graph: a model ("student", "teacher"); "joint" for all models with all
    terms; "backward" for the joint graph with its gradients; "terms" for the terms alone, where the
    models run as they are.
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
    """A part of a model, in the model's order: a repeated block, or a module outside the blocks.

    A module that contains blocks is a part as well, and counts only what is directly its own; the
    model itself has an empty path. ``kinds`` pairs the path of each mixer and MLP that the
    structure shows with its kind. ``forward`` and ``backward`` are FLOPs; ``backward`` is 0 in a
    frozen teacher.
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
    """Floating point operations of a step, by purpose.

    ``teacher`` counts the models that terms only compare with, ``forward`` and ``backward`` the
    other models. ``losses`` counts the terms, forward and backward, with the heads that are fused
    with them; ``again`` counts operations that the backward recomputes.
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
    """The memory that is allocated while one operator runs: bytes by owner.

    The owners are "weights", each model by name, "taps", "head", "losses" and "gradients".
    """

    phase: str  # "forward" or "backward"
    at: str  # the block that runs, or the part of the step
    held: dict[str, int]

    @property
    def total(self) -> int:
        """The bytes of all owners."""
        return sum(self.held.values())


@dataclass(frozen=True)
class Memory:
    """Bytes that a step needs, predicted without running it.

    ``peak`` is the weights and everything else that is alive at the worst moment; the states of an
    optimizer come on top of it. ``timeline`` is thinned, but keeps the worst moment.
    """

    weights: dict[str, int]  # parameters and buffers, by model
    gradients: int
    optimizers: dict[str, int]  # states, by optimizer
    saved: int  # activations that the forward saves for the backward, without parameters and inputs
    taps: int  # matched values of all models, the most at any moment
    head: int  # logits, or what the fused head holds in place of them, the most at any moment
    transient: int  # at the peak: memory that is neither weights, nor gradients, nor saved
    peak: int
    peak_at: str
    timeline: tuple[Moment, ...]


@dataclass(frozen=True)
class Plain:
    """The costs of training the same student on labels alone, without fusing its head.

    Distillation adds to these. The fields mean the same as those of ``Flops`` and ``Memory``.
    """

    flops: int
    peak: int
    gradients: int = 0
    saved: int = 0
    head: int = 0
    transient: int = 0


@dataclass(frozen=True)
class Collective:
    """A kind of collective: its owner, its calls in a step, the bytes they return on a rank."""

    owner: str  # a model by name, or "terms"
    kind: str
    times: int
    bytes: int


@dataclass(frozen=True)
class Event:
    """Something that happened while compiling: a "capture", "recompile" or "fallback"."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Cast:
    """Casts of floating point values, counted by model and dtypes."""

    owner: str
    before: str
    after: str
    times: int


@dataclass(frozen=True)
class Facts:
    """Everything that a report knows about a step; ``stopped`` says why it knows no more.

    A part that is not known is ``None`` or empty.
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
    nodes: dict[str, int] = dataclasses.field(default_factory=dict)  # of the joint graph by section
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
        """The report as plain dictionaries, lists, numbers and texts."""
        found: dict[str, Any] = json.loads(self.to_json())
        return found

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON, with keys in the order of the fields."""
        return json.dumps(as_json(self), indent=indent, allow_nan=False)


def as_json(value: Any) -> Any:
    """Turn dataclasses into dictionaries, and numbers that JSON lacks (inf, nan) into texts."""
    if dataclasses.is_dataclass(value):
        return {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: as_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
