"""The Distiller: student, teacher, projections and objective behind one call."""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from rich.console import Group
from torch import Tensor, nn

from fxdistill import parallel
from fxdistill.base.ranks import Ranks
from fxdistill.base.tensors import scalar
from fxdistill.compiler import capture
from fxdistill.compiler.backend import Recipe
from fxdistill.compiler.journal import Past
from fxdistill.distiller.modes import collect, terms_of
from fxdistill.distiller.options import Plan
from fxdistill.distiller.output import DistillOutput
from fxdistill.distiller.settings import check_settings
from fxdistill.distiller.step import run_towers, step
from fxdistill.distiller.towers import Towers
from fxdistill.errors import CaptureError, MatchWarning, OptionError, did_you_mean
from fxdistill.graph.halves import Halves
from fxdistill.graph.joint import JointProgram
from fxdistill.heads.find import Found, deferrable, mesh_sizes, sharded_vocabularies
from fxdistill.heads.unmade import deferring
from fxdistill.mapping.matches import Matches
from fxdistill.models.devices import check_devices, check_same_device, device_of
from fxdistill.models.landmarks import head_path
from fxdistill.models.modes import buffers_kept_on_error, modes_kept_on_error, settle_modes
from fxdistill.models.tap import Tap
from fxdistill.objective.call import Call, Inputs, sort_call
from fxdistill.objective.checks import verify
from fxdistill.objective.objective import Losses, Objective
from fxdistill.objective.term import GLOBAL_SETTINGS
from fxdistill.objective.tokens import TOKEN_FIELDS, Batch
from fxdistill.report import Report
from fxdistill.report.faces.summary import summary
from fxdistill.report.read import notes
from fxdistill.taps.hooks import hooked
from fxdistill.taps.table import TapTable, recording


class Distiller(nn.Module):
    """Call it like the student; ``backward()`` on the ``loss`` it returns.

    Made by ``fxdistill.wrap``. ``parameters()`` and ``state_dict()`` are the student's and the
    projections', under ``student.`` and ``projections.``; a frozen teacher is moved by ``to()`` and
    otherwise left alone, in eval mode.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        objective: Objective,
        projections: nn.ModuleList,
        matches: Matches,
        settings: Mapping[str, float | Tensor],
        plan: Plan,
    ) -> None:
        super().__init__()
        self.student = student
        self.projections = projections
        self.objective = objective
        self.matches = matches
        self.plan = plan
        # A frozen teacher is not registered: it has no place in parameters() or state_dict().
        self._towers = Towers(teacher, plan.shardings)
        if not plan.freeze_teacher:
            self._modules["teacher"] = teacher
        self._settings: dict[str, float | Tensor] = dict(settings)
        self._vector: Tensor | None = None
        self._steps: dict[str, Callable[..., Any]] = {}
        self._head_paths: tuple[str | None, ...] | None = None  # looked for once, when needed
        self._passed = False  # whether a step has run to its end outside of one graph
        self._warnings: dict[str, bool] = {}  # text, and whether it was given
        self.past = Past()
        # Not self.train(): parts of the student may be in a mode of their own.
        self.training = student.training
        self.projections.train(student.training)
        training = sum(module.training for module in teacher.modules())
        self._settle_modes()
        settled = training - sum(module.training for module in teacher.modules())
        own = notes.notes_of(objective, settings), notes.settled(settled)
        self._notes = (*plan.notes, *own[0], *own[1])

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("student", "teacher") and "_towers" in self.__dict__:
            raise AttributeError(f"a distiller keeps its {name}: call fxdistill.wrap again")
        super().__setattr__(name, value)

    @property
    def teacher(self) -> nn.Module:
        """The teacher."""
        return self._towers.teacher

    @property
    def program(self) -> JointProgram | None:
        """The graph of the last step that was captured, for reading."""
        return self.past.program

    def run(self, tower: str, inputs: Inputs) -> Any:
        """Run one of the models, on a mesh with the weights that a step uses."""
        return self._towers.run(tower, getattr(self, tower), inputs)

    # ------------------------------------------------------------------ calling

    def forward(self, *args: Any, **kwargs: Any) -> DistillOutput:
        """Run both models on the inputs and return the loss.

        ``labels``, ``loss_mask``, ``token_weights``, ``num_items`` (or ``num_items_in_batch``),
        ``num_feature_items`` and ``teacher_inputs`` stay here; everything else goes to both models.
        """
        one_graph = self.plan.mode == "one_graph"
        run = self._forward if one_graph else torch.compiler.disable(self._forward)
        out: DistillOutput = run(args, kwargs)
        return out

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DistillOutput:
        self.past.called(args, kwargs)
        call = self._sort(args, kwargs)
        self._guard(call)
        objective = self._objective_of(call)
        settings = self._settings_on(device_of(self.student))
        try:
            losses, logits = self._run(objective, call, settings)
        except CaptureError as error:
            if not self.plan.fallback:
                raise
            losses, logits = self._fall_back(error, objective, call, settings)
        self._announce()
        self._towers.compare(losses.terms, self.student)
        out = DistillOutput(loss=losses.total, losses=losses.terms)
        if logits is not None:
            out["logits"] = logits
        return out

    def _objective_of(self, call: Call) -> Objective:
        objective = self.objective.on(_averaging_ranks(self))
        return objective if call.batch.labels is not None else objective.without_labels()

    def _fall_back(
        self, error: CaptureError, objective: Objective, call: Call, settings: Tensor
    ) -> tuple[Losses, Tensor | None]:
        """Go regional, and stay there if that works."""
        before = self.plan
        self.plan = dataclasses.replace(before, mode="regional")
        try:
            result = self._run(objective, call, settings)
        except Exception:
            self.plan = before
            raise
        self.past.fell_back(str(error))
        lost = ", without your passes" if before.passes else ""
        warnings.warn(f'falling back to compile="regional"{lost}: {error}', stacklevel=5)
        return result

    def _run(
        self, objective: Objective, call: Call, settings: Tensor
    ) -> tuple[Losses, Tensor | None]:
        mode = self.plan.mode
        with self._taps(objective, call.batch, capturing=mode == "one_graph") as table:
            inputs = (self, objective, call.student, call.teacher)
            if mode == "one_graph":
                return self._compiled("step", step)(table, *inputs, call.batch, settings)  # type: ignore[no-any-return]
            # Models that run before their values are checked are put back if the checks fail. Once
            # they have passed, a step need not keep copies.
            models = () if self._passed else (self, self.teacher)
            with buffers_kept_on_error(*models):
                if mode == "eager":
                    result = step(*inputs, call.batch, settings)
                else:
                    found = self._heads(objective)
                    self.past.logits_made = found.why_not
                    with deferring(found.heads) as waiting:
                        anchor = run_towers(*inputs)
                    values = collect(objective, "logits" in self.plan.outputs)
            self._passed = True
            if mode == "eager":
                return result
        with recording(TapTable(capturing=True)) as table:
            terms = self._compiled("terms", terms_of)
            losses, logits = terms(table, self, objective, values, call.batch, settings, anchor)
        waiting.hand_to(losses.total)
        return losses, logits

    def _heads(self, objective: Objective) -> Found:
        """The heads whose logits only the losses read."""
        if not self.plan.fuse_head or not objective.can_fuse or "logits" in self.plan.outputs:
            return Found()
        both = objective.logit_loss is not None
        return deferrable(self.student, self.teacher, self._paths_of_heads(), both=both)

    def _paths_of_heads(self) -> tuple[str | None, ...]:
        if self._head_paths is None:
            self._head_paths = head_path(self.student), head_path(self.teacher)
        return self._head_paths

    def _compiled(self, name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        if name not in self._steps:
            dynamic = self._towers.dynamic(self.student, self.plan.dynamic)
            self._steps[name] = capture.one_graph(step, self._recipe(), dynamic)
        return self._steps[name]

    # Where a user compiles around a distiller, dynamo would meet the weak reference.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _recipe(self) -> Recipe:
        return Recipe.of(self.plan).noting(self.past)

    @contextlib.contextmanager
    def _taps(self, objective: Objective, batch: Batch, *, capturing: bool) -> Iterator[TapTable]:
        """Hooks on both towers and a table for what they see, for one call."""
        terms = objective.features
        table = TapTable(capturing=capturing)
        table.verify = functools.partial(verify, objective, self.projections)
        table.frozen_teacher = self.plan.freeze_teacher
        models = {"student": self.student, "teacher": self.teacher}
        table.vocabularies = sharded_vocabularies(models, self._paths_of_heads())
        table.ranks = {tower: mesh_sizes(model) for tower, model in models.items()}
        table.grids = batch.grids
        with (
            recording(table),
            hooked(self.student, "student", [t.student for t in terms]),
            hooked(self.teacher, "teacher", [t.teacher for t in terms]),
        ):
            try:
                yield table
                self._warnings = {**dict.fromkeys(table.warnings, False), **self._warnings}
            except Exception:
                # Parts that the user compiled wrap what a tap raises; what it said is in the table.
                if table.failure is not None:
                    raise table.failure from None
                raise

    def _announce(self) -> None:
        """Give each warning of the checks once."""
        for text in [text for text, given in self._warnings.items() if not given]:
            self._warnings[text] = True
            warnings.warn(text, MatchWarning, stacklevel=4)

    def _guard(self, call: Call) -> None:
        """What is checked before every step; a look at flags and devices."""
        tokens = {name: getattr(call.batch, name) for name in TOKEN_FIELDS}
        check_devices(self.student, "student", call.student.args, call.student.kwargs)
        check_devices(self.student, "student", (), tokens)
        if self.objective.uses_teacher:
            check_same_device(self.student, self.teacher, "teacher")
            check_devices(self.teacher, "teacher", call.teacher.args, call.teacher.kwargs)
        for i, projection in enumerate(self.projections):
            check_same_device(self.student, projection, f"projection {i}")
        self._settle_modes()

    def _sort(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        return sort_call(self.student, self.teacher, self.objective.task, args, kwargs)

    # ------------------------------------------------------------------ settings

    def set(self, *, weights: Mapping[str, float | Tensor] | None = None, **values: Any) -> None:
        """Change weights or the temperature; nothing recompiles.

        ``logit_weight``, ``feature_weight``, ``label_weight``, ``temperature``, and by
        ``weights={term name: weight}`` the weights of single matches.
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
        new = {**values, **(weights or {})}
        check_settings(new)
        self._settings = {**self._settings, **new}
        self._vector = None

    def _settings_on(self, device: torch.device) -> Tensor:
        if self._vector is None or self._vector.device != device:
            keys = (*GLOBAL_SETTINGS, *(term.name for term in self.objective.features))
            # Kept for later steps, which may train: an evaluation may run in inference mode.
            with torch.inference_mode(False):
                self._vector = torch.stack([scalar(self._settings[key], device) for key in keys])
        return self._vector

    # ------------------------------------------------------------------ life cycle

    def train(self, mode: bool = True) -> "Distiller":
        """Student and projections to train or eval mode; a frozen teacher stays in eval mode."""
        with modes_kept_on_error(self):
            super().train(mode)
            self._settle_modes()
        return self

    def _settle_modes(self) -> None:
        if self.plan.freeze_teacher and self.objective.uses_teacher:
            settle_modes(self.student, self.teacher)

    def _apply(self, fn: Any, recurse: bool = True) -> "Distiller":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
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
        if own := [p for p in self.projections.parameters() if p.requires_grad]:
            groups.append({"params": own, **projection_options})
        return groups

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale all gradients, sharded or not, to a norm of at most ``max_norm``; return theirs.

        As ``torch.nn.utils.clip_grad_norm_``, for parameters on several meshes and on none too:
        call it on every rank. See ``parallel.gradients``.
        """
        norm: Tensor = parallel.gradients.clip_grad_norm_(self.parameters(), max_norm, norm_type)
        return norm

    def warmup(self, *args: Any, **kwargs: Any) -> None:
        """Compile forward and backward for these inputs, and leave no trace.

        Gradients, buffers and random numbers are as before.
        """
        params = [p for p in self.parameters() if p.requires_grad]
        buffers = {b: b.detach().clone() for b in self.buffers()}
        cuda = [p.device for p in params[:1] if p.is_cuda]
        try:
            with torch.random.fork_rng(devices=cuda):
                out = self(*args, **kwargs)
                if out.loss.requires_grad:
                    torch.autograd.grad(out.loss, params, allow_unused=True)
        finally:
            with torch.no_grad():
                for buffer, before in buffers.items():
                    buffer.copy_(before)

    def check(self, *args: Any, **kwargs: Any) -> JointProgram:
        """Capture the step on these inputs' shapes, raising what would go wrong; runs nothing."""
        call = self._sort(args, kwargs)
        self._guard(call)
        program, *_ = self.dry(call, self._objective_of(call), self._recipe(), cut=False)
        self._announce()
        return program

    def dry(
        self, call: Call, objective: Objective, recipe: Recipe, *, cut: bool
    ) -> tuple[JointProgram, Halves | None, TapTable]:
        """Capture a step, and with ``cut`` go on to its two halves; runs nothing."""
        settings = self._settings_on(device_of(self.student))
        inputs = (self, objective, call.student, call.teacher, call.batch, settings)
        run = capture.dry_halves if cut else capture.dry_run
        with self._taps(objective, call.batch, capturing=True) as table:
            return *run(step, recipe, table, *inputs), table

    def report(self, *args: Any, **kwargs: Any) -> Report:
        """What a step on these inputs will need and do; runs nothing, and changes nothing.

        Inputs are those of a call, or none: then those of the last call. Models may lie on the meta
        device, or be fake: no weight is needed. ``print`` it by ``rich``; ``to_json()`` and
        ``to_html(path)``. What cannot be captured makes it partial, and ``stopped`` says why.

        Raises:
            StepError: Without inputs, before any call.
        """
        # It reads what this module makes.
        from fxdistill.report.build import build

        return build(self, args, kwargs)

    def tapped_shapes(self, *args: Any, **kwargs: Any) -> dict[tuple[str, Tap], Tensor]:
        """The shapes of all matched values for these inputs, as meta tensors; runs nothing.

        A module that is not executed is left out.
        """
        call = self._sort(args, kwargs)
        self._guard(call)
        objective = dataclasses.replace(self.objective, logit_loss=None).without_labels()
        with self._taps(objective, call.batch, capturing=True) as table:
            capture.dry_values(run_towers, table, self, objective, call.student, call.teacher)
        return {
            key: torch.empty([int(size) for size in value.shape], device="meta")
            for key, value in table.values.items()
        }

    def summary(self) -> Group:
        """What was compiled, for ``rich``: pairs, and what each pass did at the first call."""
        notes = (*self.matches.notes, *self._notes, *self._warnings)
        return summary(self.objective, self.projections, self.program, self.plan.mode, notes)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_steps": {}, "_vector": None}  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """The terms, for ``print(distiller)``."""
        return f"mode={self.plan.mode}, matches={len(self.objective.features)}"


def _averaging_ranks(module: nn.Module) -> Ranks | None:
    """The ranks over which a wrapper (DDP, FSDP2) will average gradients; ``None`` without one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    ranks: Ranks | None = parallel.wrappers.averaging_ranks(module)
    return ranks
