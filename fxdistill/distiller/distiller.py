"""The Distiller: models, projections and objective behind one call."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxdistill import parallel
from fxdistill.base.warn import warn
from fxdistill.compiler.backend import Recipe
from fxdistill.compiler.journal import Journal
from fxdistill.distiller import after, dry, returned, whose, whose_labels
from fxdistill.distiller.agreement import Agreement, agreement, evaluating
from fxdistill.distiller.guard import (
    check_call,
    check_holds_no_frozen,
    check_not_crossed,
    freezes,
    settle,
)
from fxdistill.distiller.looking import Looking, averaging_ranks
from fxdistill.distiller.modes import Request, Result, Steps, eager, in_one_graph, regional
from fxdistill.distiller.options import Options
from fxdistill.distiller.output import DistillOutput, output_of
from fxdistill.distiller.saved import Saved
from fxdistill.distiller.settings import Setting, Settings, TeacherWeights
from fxdistill.distiller.student_face import StudentFace, StudentForward
from fxdistill.distiller.towers import Model, Towers
from fxdistill.distiller.warmup import warm_up
from fxdistill.errors import CaptureError, FxDistillError, MatchWarning, StepError
from fxdistill.mapping.matches import Matches
from fxdistill.models.devices import device_of
from fxdistill.models.modes import modes_kept_on_error
from fxdistill.models.tap import Tower
from fxdistill.objective.beside import Beside
from fxdistill.objective.call import CALL_KEYWORDS, Call, sort_call
from fxdistill.objective.objective import Objective
from fxdistill.report.read import notes


class Distiller(StudentFace, Saved, Looking):
    """The module that ``fxdistill.wrap`` returns: call it like the student.

    Call ``backward()`` on the ``loss`` of its output. ``parameters()`` and ``state_dict()`` cover
    the models that learn, the projections, the losses that are modules and the modules of heads,
    under ``student.``, ``projections.``, ``loss_modules.`` and ``heads.``; a state dict also has
    the settings, and each tensor once. ``to()`` moves a frozen teacher too; otherwise the teacher
    is left alone, in eval mode.
    """

    def __init__(
        self,
        models: Mapping[Tower, Model],
        objective: Objective,
        projections: nn.ModuleList,
        heads: nn.ModuleDict,
        matches: Matches,
        settings: Mapping[str, Setting],
        options: Options,
        main: Tower = "student",
        students: Sequence[Tower] = (),
    ) -> None:
        super().__init__()
        # A frozen model is not registered: parameters() and state_dict() must not contain it.
        losses = nn.ModuleList()
        objective = objective.with_modules(losses)
        self._towers = Towers(models, Beside(projections, losses, heads), main)
        check_holds_no_frozen(self._towers)
        if students:
            self._modules["students"] = nn.ModuleList(models[t].module for t in students)
        for tower in (main, *(t for t in models if t != main)):
            if models[tower].trains and tower not in students:
                self._modules[tower] = models[tower].module
        self.projections, self.loss_modules, self.heads = projections, losses, heads
        # DDP would copy the first rank's queues over those that other ranks have of their own.
        self._ddp_params_and_buffers_to_ignore = [
            f"loss_modules.{name}" for name, _ in losses.named_buffers()
        ]
        self.save_each_tensor_once()
        self.objective = dataclasses.replace(objective, frozen=self._towers.frozen)
        self.matches = matches
        self.options = options
        self.journal = Journal()
        self._settings = Settings(settings, objective.names)
        self._steps = Steps()
        self._untold = ""  # why it could not be told which values have tokens
        self._warnings: dict[str, bool] = {}  # by text: whether it has been given
        freezes(self, (models[tower].module for tower in self._towers.frozen))
        # Not self.train(): parts of the student may have been put in another mode on purpose.
        self.training = models[main].module.training
        for module in self._towers.beside:
            module.train(self.training)
        settled = self._settled()
        self._notes = (*options.notes, *notes.notes_of(self.objective, settings), *settled)

    def _settled(self) -> list[str]:
        """Put frozen models in eval mode, and return a note for each that was not in it."""
        frozen = {t: self._towers.modules[t] for t in self._towers.frozen}
        before = {t: sum(m.training for m in model.modules()) for t, model in frozen.items()}
        settle(self._towers, self.objective)
        after = {t: sum(m.training for m in model.modules()) for t, model in frozen.items()}
        return [note for t in frozen for note in notes.settled(t, before[t] - after[t])]

    def __setattr__(self, name: str, value: Any) -> None:
        towers = self.__dict__.get("_towers")
        if towers is not None and name in towers.modules:
            raise AttributeError(f"a distiller keeps its {name}: call fxdistill.wrap again")
        super().__setattr__(name, value)

    @property
    def models(self) -> dict[Tower, nn.Module]:
        """All models by name, in the order in which they run."""
        return dict(self._towers.modules)

    @property
    def main(self) -> Tower:
        """The name of the model that the distiller is called like."""
        return self._towers.main

    @property
    def students(self) -> tuple[nn.Module, ...]:
        """The models that terms make learn from others; most distillers have one."""
        several = self._modules.get("students")
        return (self._towers.main_module,) if several is None else tuple(several.children())

    @property
    def teachers(self) -> dict[Tower, nn.Module]:
        """The models that the student learns from, by name; of mutual learning there are none."""
        ours = set(map(id, self.students))
        return {t: m for t, m in self._towers.modules.items() if self._is_teacher(t, m, ours)}

    def _is_teacher(self, tower: Tower, model: nn.Module, students: set[int]) -> bool:
        return tower != self.main and (id(model) not in students or "students" not in self._modules)

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher, or the first of several; ``None`` without one."""
        return next(iter(self.teachers.values()), None)

    @property
    def settings(self) -> dict[str, Setting]:
        """The global weights, the temperature, and the weight of each match by its name."""
        return dict(self._settings.values)

    # ------------------------------------------------------------------ calling

    @StudentForward
    def forward(
        self,
        *args: Any,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_items: Tensor | float | None = None,
        num_items_in_batch: Tensor | float | None = None,
        num_feature_items: Tensor | float | None = None,
        num_head_items: Mapping[str, Tensor | float] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> DistillOutput:
        """Run all models on the inputs and return the loss.

        Args:
            args: Positional inputs of the models.
            labels: The targets, ``[B, L]`` like ``input_ids`` (``[B]`` in classification).
            loss_mask: Which tokens count; indexed like the labels.
            token_weights: How much each of them counts.
            num_items: The denominator of label and logit terms, where gradients are accumulated
                over several batches. Feature terms weigh by this batch's share of it.
            num_items_in_batch: The number of labels in all of them, as trainers count: terms weigh
                by this batch's share.
            num_feature_items: The denominator of feature terms.
            num_head_items: The denominators of the terms of heads, by their names.
            weights: By name, what ``Match(weights=...)`` asks for: which samples or places count.
            kwargs: Inputs of the models whose ``forward`` takes them. ``student_inputs`` and
                ``teacher_inputs`` are dicts, laid over the others for one model.
        """
        counts = (num_items, num_items_in_batch, num_feature_items, num_head_items)
        own = (labels, loss_mask, token_weights, *counts, weights)
        named = zip(CALL_KEYWORDS, own, strict=True)
        kwargs.update({name: value for name, value in named if value is not None})
        one_graph = self.options.mode == "one_graph"
        run = self._forward if one_graph else torch.compiler.disable(self._forward)
        out: DistillOutput = run(args, kwargs)
        return out

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DistillOutput:
        self.journal.called(args, kwargs)
        check_not_crossed(self, self._towers)
        request = self._request(self._sorted(args, kwargs))
        self._warn_without_terms(request)
        try:
            losses, logits = self._run(request)
        except Exception as error:
            if not (self.options.falls_back and isinstance(error, (CaptureError, StepError))):
                after.raise_label_error(error, request, self._steps)
                raise
            losses, logits = self._fall_back(error, request)
        if self._untold:
            self._steps.told = True
        self._announce()
        self._towers.compare(losses.terms)
        return output_of(losses, logits)

    def _warn_without_terms(self, request: Request) -> None:
        objective, labels = request.objective, request.call.batch.labels
        of_heads = any(h.logits or (h.labels and labels is not None) for h in objective.heads)
        if not (objective.features or objective.logits or objective.labels or of_heads):
            text = (
                "no term is in the loss, so it is 0 and teaches nothing: pass labels, give a "
                "mapping, or a logit_loss"
            )
            self._warnings = {text: False, **self._warnings}

    def _sorted(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Sort and check the arguments of a call."""
        towers, objective = self._towers, self.objective
        call = sort_call(towers.modules, towers.main, objective.task, args, dict(kwargs))
        check_call(towers, objective, call)
        if not self._steps.told and whose.asks(objective, call, towers, self._steps):
            self._tell_tokens(call)
        return call

    # Models are run on fake tensors, which dynamo does not trace.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _tell_tokens(self, call: Call) -> None:
        """Find out, once, which values have tokens, and channels; fake models leave it open.

        What could not be told is settled by the first step that runs: a call may be wrong itself.
        """
        request = self._request(call)
        if not dry.is_fake(request):
            self.objective, why, doubts = whose.told(request, self._steps)
            self._warnings = {**dict.fromkeys(doubts, False), **self._warnings}
            self._steps.told = not why
            kept = [note for note in self._notes if note != self._untold]
            self._notes, self._untold = (*kept, *([why] if why else [])), why

    def _request(self, call: Call) -> Request:
        objective = self.objective.on(averaging_ranks(self))
        main = self._towers.main_module
        objective = whose_labels.of_labels(objective, call, main, call.inputs[self.main])
        if self._evaluates():
            objective = returned.in_evaluation(objective, self._towers, self._steps)
        settings = self._settings.on(device_of(main))
        return Request(self._towers, objective, call, settings)

    def _evaluates(self) -> bool:
        """Whether this is a step of an evaluation, which gives predictions unasked."""
        asked = self.options.outputs is not None
        return asked and not self.training and not torch.is_grad_enabled()

    def _run(self, request: Request) -> Result:
        options = self.options
        if options.mode == "one_graph":
            result = in_one_graph(request, self._steps, self._recipe(), options.dynamic)
        elif options.mode == "eager":
            result = eager(request, self._steps)
        else:
            fuse, recipe = options.fuse_head, self._recipe()
            result = regional(request, self._steps, recipe, options.dynamic, fuse=fuse)
        self._note_warnings(request)
        return result

    def _fall_back(self, error: FxDistillError, request: Request) -> Result:
        """Run the step in regional mode, and keep that mode if it works."""
        before = self.options
        self.options = dataclasses.replace(before, mode="regional")
        try:
            result = self._run(request)
        except Exception as again:
            self.options = before
            if isinstance(error, CaptureError) or isinstance(again, FxDistillError):
                raise
            raise error from again  # which names the model and its line
        self.journal.fell_back(str(error))
        lost = ", without your passes" if before.passes else ""
        warn(f'falling back to compile="regional"{lost}: {error}')
        return result

    # Dynamo cannot trace a weak reference: make the recipe outside any surrounding compile.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _recipe(self) -> Recipe:
        return self.options.recipe(self._towers, self.objective.weighed).noting(self.journal)

    def _announce(self) -> None:
        """Give each warning of the checks that has not been given yet."""
        for text in [text for text, given in self._warnings.items() if not given]:
            self._warnings[text] = True
            warn(text, MatchWarning)

    def set(
        self,
        *,
        weights: Mapping[str, Setting] | None = None,
        teacher_weights: TeacherWeights | None = None,
        **values: Any,
    ) -> None:
        """Change weights or the temperature; nothing recompiles.

        The keywords are ``logit_weight``, ``feature_weight``, ``label_weight``, ``temperature``,
        and ``threshold`` of an importance that has one; ``weights={term name: weight}`` sets those
        of matches and of the terms of heads, ``teacher_weights`` those of several teachers. Values
        are numbers or 0-d tensors. A pending backward keeps the values of its own step.

        Raises:
            OptionError: A name is unknown, or a value is not a finite number. Nothing is changed.
        """
        self._settings.set(weights, teacher_weights, values)

    # ------------------------------------------------------------------ life cycle

    def train(self, mode: bool = True) -> "Distiller":
        """Put student and projections in train or eval mode; a frozen teacher stays in eval."""
        with modes_kept_on_error(self):
            super().train(mode)
            settle(self._towers, self.objective)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "Distiller":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for tower in self._towers.frozen:
            self._towers.modules[tower]._apply(fn)
        self._settings.forget()
        return self

    def param_groups(self, **projection_options: Any) -> list[dict[str, Any]]:
        """Optimizer groups: the models' parameters, the projections', and those of loss modules.

        The last two get these options, and are there if they have parameters.
        """
        seen: set[int] = set()

        def learning(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
            found = {id(p): p for module in modules for p in module.parameters()}
            new = {i: p for i, p in found.items() if p.requires_grad and i not in seen}
            seen.update(new)
            return list(new.values())

        groups: list[dict[str, Any]] = [{"params": learning(self._towers.trained())}]
        beside = [learning([module]) for module in self._towers.beside]
        groups += [{"params": own, **projection_options} for own in beside if own]
        return groups

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale all gradients to a norm of at most ``max_norm``; return the norm before.

        This is ``torch.nn.utils.clip_grad_norm_``, but parameters may lie on several meshes or on
        none. Call it on every rank. See ``parallel.gradients`` for the formula.
        """
        norm: Tensor = parallel.gradients.clip_grad_norm_(self.parameters(), max_norm, norm_type)
        return norm

    def warmup(self, *args: Any, **kwargs: Any) -> None:
        """Compile the step for calls like this one, forward and backward, ahead of training.

        One step runs on these inputs, in the current mode (of training, of autocast, of grad), and
        what it changed is restored: gradients, buffers (running statistics, queues), random
        states, modes, numbers and flags. On a mesh and under DDP, call it on all ranks. Without a
        graph to compile (``compile=False``) it does nothing.

        Raises:
            StepError: The student writes its own parameters in its forward; that is not undone.
        """
        if self.options.mode == "eager":
            return
        warm_up(lambda: self(*args, **kwargs).loss, self._towers.every)

    def agreement(self, batch: Mapping[str, Any]) -> Agreement:
        """How far student and teacher agree on a batch, for evaluation.

        The models run as they are, without compiling, in eval mode and without gradients; every
        module's mode is put back. The mean is over the predictions that the logit term counts (by
        labels, masks and weights; ``importance`` has no part), and over the vocabulary that both
        models have. With several pairs of models, it is the mean over these. On a mesh and under
        FSDP2 the samples of all ranks count, under DDP this rank's own.

        Args:
            batch: The keyword arguments of a call.

        Returns:
            ``(top1, divergence)``, 0-d tensors on the device: Σ w·[argmax z_S = argmax z_T] / Σ w,
            and Σ w·KL(softmax z_T ‖ softmax z_S) / Σ w, at τ = 1. Both are 0 where nothing counts.

        Raises:
            LogitsError: A model returns no logits, or there is no teacher.
        """
        with evaluating(self._towers.modules.values()):
            request = self._request(self._sorted((), dict(batch)))
            return agreement(request, self._settings)

    def extra_repr(self) -> str:
        """The mode and the number of matches, for ``print(distiller)``."""
        return f"mode={self.options.mode}, matches={len(self.objective.features)}"
