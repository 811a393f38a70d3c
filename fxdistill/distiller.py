"""The Distiller: student, teacher, projections and objective behind one call."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from fxdistill import capture, guards
from fxdistill.capture import Recipe
from fxdistill.errors import CaptureError, LogitsError, OptionError, did_you_mean
from fxdistill.lower import Lowering
from fxdistill.objective import GLOBAL_SETTINGS, LOGITS, Losses, Objective, lookup_marker
from fxdistill.output import DistillOutput
from fxdistill.program import JointProgram, Pass
from fxdistill.roles import decoder_inputs, logits_of
from fxdistill.taps import Tap, TapTable, begin, check, hooked, named, recording, tap
from fxdistill.tokens import Batch

Mode = Literal["one_graph", "regional", "eager"]
CALL_KEYWORDS = (
    "labels",
    "loss_mask",
    "token_weights",
    "num_items",
    "num_items_in_batch",
    "num_feature_items",
    "teacher_inputs",
)


@dataclass(frozen=True)
class Plan:
    """How a distiller runs: what ``wrap`` made of its options."""

    mode: Mode = "one_graph"
    lowering: Lowering = Lowering()
    dynamic: bool | None = None
    fallback: bool = False
    passes: tuple[Pass, ...] = ()
    freeze_teacher: bool = True
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Call:
    """One call, sorted: what goes to which model, and what stays here."""

    args: tuple[Any, ...]
    student: dict[str, Any]
    teacher: dict[str, Any]
    batch: Batch


class Distiller(nn.Module):
    """Call it like the student; ``backward()`` on the ``loss`` it returns.

    Made by ``fxdistill.wrap``. ``parameters()`` and ``state_dict()`` are the student's and the
    projections'; a frozen teacher is moved by ``to()`` and otherwise left alone, in eval mode.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        objective: Objective,
        projections: nn.ModuleList,
        settings: Mapping[str, float],
        plan: Plan,
    ) -> None:
        super().__init__()
        self.student = student
        self.projections = projections
        self.objective = objective
        self.plan = plan
        # A frozen teacher is not registered: it has no place in parameters() or state_dict().
        self._towers = _Towers(teacher)
        if not plan.freeze_teacher:
            self._registered_teacher = teacher
        self._settings = dict(settings)
        self._vector: Tensor | None = None
        self._steps: dict[str, Callable[..., Any]] = {}
        self.program: JointProgram | None = None
        self.train(student.training)

    @property
    def teacher(self) -> nn.Module:
        """The teacher."""
        return self._towers.teacher

    # ------------------------------------------------------------------ calling

    def forward(self, *args: Any, **kwargs: Any) -> DistillOutput:
        """Run both models on the inputs and return the loss.

        ``labels``, ``loss_mask``, ``token_weights``, ``num_items`` (or ``num_items_in_batch``),
        ``num_feature_items`` and ``teacher_inputs`` stay here; everything else goes to both models.
        """
        return self._forward(args, kwargs)

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DistillOutput:
        call = self._sort(args, kwargs)
        guards.check_devices(self.student, call.args, call.student)
        self._settle_modes()
        objective = self.objective
        if call.batch.labels is None:
            objective = objective.without_labels()
        settings = self._settings_on(guards.device_of(self.student))
        try:
            losses, logits = self._run(objective, call, settings)
        except CaptureError as error:
            if not self.plan.fallback:
                raise
            warnings.warn(f'falling back to compile="regional": {error}', stacklevel=2)
            self.plan = dataclasses.replace(self.plan, mode="regional")
            losses, logits = self._run(objective, call, settings)
        out = DistillOutput(loss=losses.total, losses=losses.terms)
        if logits is not None:
            out["logits"] = logits
        return out

    def _run(
        self, objective: Objective, call: Call, settings: Tensor
    ) -> tuple[Losses, Tensor | None]:
        mode = self.plan.mode
        with self._taps(objective, capturing=mode == "one_graph") as table:
            inputs = (self, objective, call.args, call.student, call.teacher)
            if mode == "one_graph":
                return self._compiled("step", _step)(table, *inputs, call.batch, settings)  # type: ignore[no-any-return]
            if mode == "eager":
                return _step(*inputs, call.batch, settings)
            anchor = _towers(*inputs)
            values = dict(table.values)
        with recording(TapTable(capturing=True)) as table:
            terms = self._compiled("terms", _terms)
            return terms(table, self, objective, values, call.batch, settings, anchor)  # type: ignore[no-any-return]

    def _compiled(self, name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        if name not in self._steps:
            recipe = Recipe(self.plan.lowering, self.plan.passes, self._keep)
            self._steps[name] = capture.one_graph(step, recipe, self.plan.dynamic)
        return self._steps[name]

    def _keep(self, program: JointProgram) -> None:
        self.program = program

    @contextlib.contextmanager
    def _taps(self, objective: Objective, *, capturing: bool) -> Iterator[TapTable]:
        """Hooks on both towers and a table for what they see, for one call."""
        terms = objective.features
        with (
            recording(TapTable(capturing=capturing)) as table,
            hooked(self.student, "student", [t.student for t in terms]),
            hooked(self.teacher, "teacher", [t.teacher for t in terms]),
        ):
            yield table

    def _sort(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        own = {key: kwargs[key] for key in CALL_KEYWORDS if kwargs.get(key) is not None}
        shared = {key: value for key, value in kwargs.items() if key not in CALL_KEYWORDS}
        labels = own.get("labels")
        student, teacher = dict(shared), {**shared, **own.get("teacher_inputs", {})}
        if self.objective.task == "seq2seq" and labels is not None:
            for model, inputs in ((self.student, student), (self.teacher, teacher)):
                if inputs.get("decoder_input_ids") is None:
                    inputs["decoder_input_ids"] = decoder_inputs(model, labels)
        device = guards.device_of(self.student)
        items = own.get("num_items", own.get("num_items_in_batch"))
        batch = Batch(
            labels=labels,
            loss_mask=own.get("loss_mask"),
            token_weights=own.get("token_weights"),
            attention_mask=_tensor(shared.get("attention_mask")),
            num_items=_scalar(items, device),
            num_feature_items=_scalar(own.get("num_feature_items"), device),
            tokens=_token_grid(args, shared, own, self.objective.task),
            decoder_tokens=_tensor(student.get("decoder_input_ids", labels)),
        )
        return Call(args, student, teacher, batch)

    # ------------------------------------------------------------------ settings

    def set(self, *, weights: Mapping[str, float | Tensor] | None = None, **values: Any) -> None:
        """Change ``logit_weight``, ``feature_weight``, ``label_weight``, ``temperature``, or, by
        ``weights={term name: weight}``, the weights of single matches. Nothing recompiles.

        Values are numbers or 0-d tensors. The tensors of a pending backward are not written.
        """
        for name in values:
            if name not in GLOBAL_SETTINGS:
                near = did_you_mean(name, GLOBAL_SETTINGS)
                raise OptionError(f"set() knows no {name!r}. Nearest: {near}.")
        names = [term.name for term in self.objective.features]
        for name in weights or {}:
            if name not in names:
                raise OptionError(f"no term {name!r}. Nearest: {did_you_mean(name, names)}.")
        self._settings = {**self._settings, **values, **(weights or {})}
        self._vector = None

    def _settings_on(self, device: torch.device) -> Tensor:
        if self._vector is None or self._vector.device != device:
            keys = (*GLOBAL_SETTINGS, *(term.name for term in self.objective.features))
            scalars = [_scalar(self._settings[key], device) for key in keys]
            self._vector = torch.stack([s for s in scalars if s is not None])
        return self._vector

    # ------------------------------------------------------------------ life cycle

    def train(self, mode: bool = True) -> Self:
        """Student and projections to train or eval mode; a frozen teacher stays in eval mode."""
        super().train(mode)
        if hasattr(self, "_towers"):
            self._settle_modes()
        return self

    def _settle_modes(self) -> None:
        if self.plan.freeze_teacher and self.objective.uses_teacher:
            guards.settle_modes(self.student, self.teacher)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.plan.freeze_teacher:
            self.teacher._apply(fn)
        self._vector = None
        return self

    def param_groups(self, **projection_options: Any) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: the student's, then the projections' with options."""
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.student.parameters() if p.requires_grad]}
        ]
        if not self.plan.freeze_teacher:
            taken = {id(p) for p in groups[0]["params"]}
            groups[0]["params"] += [p for p in self.teacher.parameters() if id(p) not in taken]
        if list(self.projections.parameters()):
            groups.append({"params": list(self.projections.parameters()), **projection_options})
        return groups

    def warmup(self, *args: Any, **kwargs: Any) -> None:
        """Compile forward and backward for these inputs, and leave no trace: gradients, buffers and
        random numbers are as before."""
        params = [p for p in self.parameters() if p.requires_grad]
        buffers = {b: b.detach().clone() for b in self.buffers()}
        cuda = [p.device for p in params[:1] if p.is_cuda]
        with torch.random.fork_rng(devices=cuda):
            out = self(*args, **kwargs)
            if out.loss.requires_grad:
                torch.autograd.grad(out.loss, params, allow_unused=True)
        with torch.no_grad():
            for buffer, before in buffers.items():
                buffer.copy_(before)

    def check(self, *args: Any, **kwargs: Any) -> JointProgram:
        """Capture the step on these inputs' shapes, raising what would go wrong; runs nothing."""
        call = self._sort(args, kwargs)
        guards.check_devices(self.student, call.args, call.student)
        self._settle_modes()
        labelled = call.batch.labels is not None
        objective = self.objective if labelled else self.objective.without_labels()
        settings = self._settings_on(guards.device_of(self.student))
        inputs = (self, objective, call.args, call.student, call.teacher, call.batch, settings)
        with self._taps(objective, capturing=True) as table:
            return capture.dry_run(_step, self.plan.passes, table, *inputs)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        return {**state, "_steps": {}, "program": None, "_vector": None}

    def extra_repr(self) -> str:
        """The terms, for ``print(distiller)``."""
        return f"mode={self.plan.mode}, matches={len(self.objective.features)}"


class _Towers:
    """Holds a module without registering it."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher


# ---------------------------------------------------------------------- the step, traced and eager


def _step(
    distiller: Distiller,
    objective: Objective,
    args: tuple[Any, ...],
    student_inputs: dict[str, Any],
    teacher_inputs: dict[str, Any],
    batch: Batch,
    settings: Tensor,
) -> tuple[Losses, Tensor | None]:
    """Teacher, student, objective: what becomes one graph, and what eager mode runs."""
    anchor = _towers(distiller, objective, args, student_inputs, teacher_inputs)
    begin("objective")
    losses = objective(lookup_marker, batch, settings, distiller.projections, anchor)
    logits = None
    if "logits" in distiller.plan.outputs:
        logits = named(lookup_marker("student", LOGITS).detach(), "logits_output")
    terms = {name: named(value, name) for name, value in losses.terms.items()}
    return Losses(named(losses.total, "loss"), terms), logits


def _towers(
    distiller: Distiller,
    objective: Objective,
    args: tuple[Any, ...],
    student_inputs: dict[str, Any],
    teacher_inputs: dict[str, Any],
) -> Tensor:
    """Run the models; what they compute leaves through taps. Returns the anchor of the total."""
    frozen = distiller.plan.freeze_teacher
    needs_logits = objective.label_loss is not None or "logits" in distiller.plan.outputs
    if objective.uses_teacher:
        begin("teacher")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            output = distiller.teacher(*args, **teacher_inputs)
            if objective.logit_loss is not None:
                _tap_logits(output, "teacher")
    begin("student")
    output = distiller.student(*args, **student_inputs)
    if needs_logits or objective.logit_loss is not None:
        _tap_logits(output, "student")
    return guards.first_trainable(distiller)


def _terms(
    distiller: Distiller,
    objective: Objective,
    values: dict[tuple[str, Tap], Tensor],
    batch: Batch,
    settings: Tensor,
    anchor: Tensor,
) -> tuple[Losses, Tensor | None]:
    """The objective on values that were collected: what regional mode compiles."""

    def lookup(tower: str, tap: Tap) -> Tensor:
        return values[tower, tap]

    losses = objective(lookup, batch, settings, distiller.projections, anchor)
    logits = None
    if "logits" in distiller.plan.outputs:
        logits = values["student", LOGITS].detach()
    return losses, logits


def _tap_logits(output: Any, tower: str) -> None:
    logits = logits_of(output)
    if logits is None:
        no_logits(tower, type(output).__name__)
    else:
        tap(logits, tower, LOGITS.path, LOGITS.port)


@check
def no_logits(tower: str, kind: str) -> None:
    """Raise because a term needs logits."""
    raise LogitsError(
        f"the {tower} returned a {kind} without logits. A model's logits are its tensor output, or its "
        "'logits' field or key. Wrap the model with its head, or use logit_loss=None and pass no "
        "labels."
    )


# ---------------------------------------------------------------------- small conversions


def _tensor(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def _scalar(value: Any, device: torch.device) -> Tensor | None:
    """A 0-d tensor; a number is filled in on the device, without a copy from the host."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.detach().to(device=device, dtype=torch.float32).reshape(())
    return torch.full((), float(value), device=device)


def _token_grid(
    args: tuple[Any, ...], shared: dict[str, Any], own: dict[str, Any], task: str | None
) -> Tensor | None:
    """A tensor whose leading two sizes are those of the (encoder's) tokens."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(found := shared.get(name), Tensor) and found.ndim >= 2:
            return found
    mask = shared.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask
    if args and isinstance(args[0], Tensor) and args[0].ndim == 2 and not args[0].is_floating_point():
        return args[0]
    if task in ("causal_lm", "masked_lm"):
        candidates = (own.get(name) for name in ("labels", "loss_mask", "token_weights"))
        return next((t for t in candidates if isinstance(t, Tensor)), None)
    return None
