"""``Match``: one pair of values, and how to make them comparable."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Literal

from torch import Tensor, nn

from fxdistill.losses.names import loss_name
from fxdistill.models.tap import Reader

Reduction = tuple[str, Literal["mean", "max", "sum"]]
ACCEPTED = "{student path: teacher path or Match}, a list of Match, or what fxdistill.match returns"


@dataclass(frozen=True, repr=False)
class Match:
    """Compare one value of the student with one of the teacher.

    Args:
        student: A module path or a pattern of the student; in the dict form of a mapping, the key
            gives it. ``path@k`` is the k-th further call of a module that runs more than once.
        teacher: A module path or a pattern of the teacher.
        loss: A name, or a callable ``(student, teacher, weights) -> scalar``; ``None`` takes the
            ``feature_loss`` of ``wrap``.
        weight: The weight of this match in the mean over all matches.
        project: The layer that maps the student's value to the teacher's width: ``None`` (the
            shapes must agree), ``"linear"``, ``"auto"`` (a linear layer only where the widths
            differ), or a module, which several matches may share. A linear layer acts on the last
            axis; feature maps ``[B, C, *places]`` get a 1×1 convolution instead. torch initialises
            both: weights and biases uniform in ±1/√(student's width).
        rearrange: An einops pattern for both sides, or a pair ``(student's, teacher's)``, either of
            which may be ``None``. A group may drop leading or trailing entries, such as the class
            token in ``"b (1 + n) d -> b n d"``. Where a value does not determine an axis of its
            own pattern, the axis of that name in the other pattern gives its size.
        reduce: ``(pattern, "mean" | "max" | "sum")`` for both sides, or a pair of these; it runs
            after ``rearrange``.
        student_port: ``"output"`` (the first tensor of a tuple, dict or dataclass),
            ``"output[i]"``, ``"output.field"``, ``"input"``, ``"input[i]"`` or ``"input.name"``. Of
            a module that attends also ``"attention"``, for losses of attention, and as tensors
            ``"attention.q"``, ``".k"``, ``".v"`` and ``".heads"`` (before the output projection).
            Or a callable ``(module, args, kwargs, output) -> tensor``, called when the module has
            run, with what it took and returned: it computes the value, and gradients flow
            through it. Its name stands for it, so two of one module need two names.
        teacher_port: The same for the teacher.
        tokens: Whose tokens index the values: ``"input"``, ``"encoder"``, ``"decoder"``, or
            ``"teacher"``: those of the teacher's own inputs (``teacher_inputs``). ``None``: they
            have none, and nothing of the text weighs them. ``"auto"``: by their axes.
        of: Of several teachers, the one that the path is of: its name, or its index in a sequence;
            ``None``: the first. ``"self"``: the student itself, whose value is then a target
            without gradient.
        weights: The name of weights that a call brings, ``distiller(..., weights={name: tensor})``:
            ``[B]`` for samples, or the value's leading axes, or the places of a map, or ``[B, L]``
            for tokens that the model flattens. They multiply what else weighs the values
            (``weights="foreground"`` of a detector's anchors).
        shapes: ``"any"``: the loss, a callable of your own, compares values of different shapes and
            gets them as they are. A callable may say it: ``loss.compares_shapes = "any"``.
        reason: Why ``fxdistill.match`` proposed the pair; it changes nothing.
    """

    student: str | None = None
    teacher: str | None = None
    loss: str | Callable[..., Tensor] | None = field(default=None, kw_only=True)
    weight: float = field(default=1.0, kw_only=True)
    project: str | nn.Module | None = field(default=None, kw_only=True)
    rearrange: str | tuple[str | None, str | None] | None = field(default=None, kw_only=True)
    reduce: Reduction | tuple[Reduction | None, Reduction | None] | None = field(
        default=None, kw_only=True
    )
    student_port: str | Reader = field(default="output", kw_only=True)
    teacher_port: str | Reader = field(default="output", kw_only=True)
    tokens: Literal["auto", "input", "encoder", "decoder", "teacher"] | None = field(
        default="auto", kw_only=True
    )
    of: str | int | None = field(default=None, kw_only=True)
    weights: str | None = field(default=None, kw_only=True)
    shapes: Literal["equal", "any"] = field(default="equal", kw_only=True)
    reason: str = field(default="", kw_only=True, compare=False)

    def __repr__(self) -> str:
        """The fields that differ from their defaults."""
        given = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return f"Match({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"

    @property
    def options(self) -> str:
        """The options that differ from their defaults, as text for tables."""
        parts = [] if self.loss is None else [loss_name(self.loss)]
        parts += [] if self.weight == 1.0 else [f"weight {self.weight:g}"]
        told = self.project == "auto" and self.reason.endswith(" wide")
        if self.project is not None and not told:
            is_name = isinstance(self.project, str)
            parts.append(f"project {self.project if is_name else type(self.project).__name__}")
        parts += [] if self.rearrange is None else [f"rearrange {self.rearrange}"]
        parts += [] if self.tokens == "auto" else [f"tokens {self.tokens or 'none'}"]
        parts += [] if self.of is None else [f"of {self.of}"]
        parts += [] if self.weights is None else [f"weights {self.weights}"]
        parts += [] if self.shapes == "equal" else [f"shapes {self.shapes}"]
        parts += [] if self.reduce is None else [f"reduce {self.reduce}"]
        return ", ".join(parts)
