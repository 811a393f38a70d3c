"""Looking at a step without running it: check, report, summary."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fxdistill import parallel
from fxdistill.base.ranks import Ranks
from fxdistill.base.warn import warn
from fxdistill.compiler.backend import Recipe
from fxdistill.compiler.journal import Journal
from fxdistill.distiller import dry, padding
from fxdistill.distiller.explain import Explanation, explained
from fxdistill.distiller.guard import settle
from fxdistill.distiller.modes import Request, Steps
from fxdistill.distiller.options import Options
from fxdistill.distiller.settings import Settings
from fxdistill.distiller.term_gradients import term_norms
from fxdistill.distiller.towers import Towers
from fxdistill.distiller.unchanged import unchanged
from fxdistill.errors import CaptureError, StepError
from fxdistill.graph.joint import JointProgram
from fxdistill.mapping.matches import Matches
from fxdistill.models.devices import device_of
from fxdistill.objective.call import Call, inputs_of
from fxdistill.objective.objective import Objective
from fxdistill.report.build import build
from fxdistill.report.faces.summary import Summary, summary
from fxdistill.report.report import Report
from fxdistill.report.subject import CapturedStep, Subject


class Looking(nn.Module):
    """What a distiller tells of its step: errors before it, its cost, its terms."""

    _towers: Towers
    _steps: Steps
    _settings: Settings
    _notes: tuple[str, ...]
    _warnings: dict[str, bool]
    objective: Objective
    matches: Matches
    options: Options
    journal: Journal

    @abstractmethod
    def _sorted(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call: ...

    @abstractmethod
    def _request(self, call: Call) -> Request: ...

    @abstractmethod
    def _recipe(self) -> Recipe: ...

    @abstractmethod
    def _announce(self) -> None: ...

    def _note_warnings(self, request: Request) -> None:
        found = (*request.warned, *padding.warnings_of(request, self._steps))
        self._warnings = {**dict.fromkeys(found, False), **self._warnings}

    @property
    def program(self) -> JointProgram | None:
        """The graph of the last step that was captured, for reading; ``None`` before it."""
        return self.journal.program

    def check(self, *args: Any, **kwargs: Any) -> JointProgram | None:
        """Capture the step on these inputs' shapes, raising what would go wrong; runs nothing.

        Where models run as they are (regional, eager, or with a fallback) and cannot be captured,
        the step may well run: a warning says what stopped the check, and there is no program.
        """
        request = self._request(self._sorted(args, kwargs))
        try:
            program, *_ = dry.captured(request, self._steps, self._recipe(), cut=False)
        except (CaptureError, StepError) as error:
            if self.options.mode == "one_graph" and not self.options.fallback:
                raise
            warn(f"these inputs could not be checked: {error}")
            return None
        self._note_warnings(request)
        self._announce()
        return program

    def report(self, *args: Any, **kwargs: Any) -> Report:
        """Report what a step on these inputs will need and do, without running it.

        Without inputs, those of the last call are taken. Models need no weights: their parameters
        may be on the meta device, or fake tensors. Show the report with ``rich.print``,
        ``to_json()`` or ``to_html(path)``. If the step cannot be captured, the report is partial,
        and its ``stopped`` says why.

        Raises:
            StepError: There are no inputs, and nothing was called before.
        """
        settle(self._towers, self.objective)
        return build(self._subject(), args, kwargs)

    def _subject(self) -> Subject:
        towers = self._towers

        def sort(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Call, Subject]:
            return self._sorted(args, kwargs), self._subject()

        def capture(call: Call, objective: Objective, recipe: Recipe) -> CapturedStep:
            # Not the stored vector: models may be fake during a report, and then this one is too.
            settings = self._settings.made(device_of(towers.main_module))
            request = Request(towers, objective, call, settings)
            return dry.captured(request, self._steps, recipe, cut=True)

        return Subject(
            models=towers.modules,
            frozen=towers.frozen,
            main=towers.main,
            projections=towers.beside.projections,
            losses=towers.beside.losses,
            heads=towers.beside.heads,
            objective=self.objective.on(averaging_ranks(self)),
            settings=self._settings.values,
            mode=self.options.mode,
            recipe=self._recipe(),
            journal=self.journal,
            sort=sort,
            capture=capture,
            notes=(*self.matches.notes, *self._notes),
            warnings=tuple(self._warnings),
        )

    def explain(self, batch: Mapping[str, Any] | tuple[Any, ...]) -> Explanation:
        """Find what is not finite in a step: what ``out.metrics["finite"]`` only warns of.

        One step runs eagerly, as the models are, forward and backward, and each value is looked at:
        weights, inputs, parameters, the output of each module in the order in which they end, the
        values of matches, terms, the loss, gradients. Print what is returned. Nothing is changed:
        neither gradients, buffers, modes nor random states. On a mesh all ranks call it, and each
        looks at its own shards.

        Args:
            batch: The keywords of a call in a dict, or a tuple of positional inputs.

        Returns:
            The first value that is not finite (model, module or term, how many NaNs and
            infinities) as its ``first``, and all that were found as its ``findings``.

        Raises:
            OptionError: ``batch`` is neither a dict nor a tuple.
            StepError: It is called under ``torch.inference_mode()``, or the step writes parameters.
        """
        _require_gradients("explain")
        with unchanged(self._towers.every):  # sorting a call settles the modes of frozen models
            request = self._request(self._sorted(*inputs_of(batch)))
            return explained(request, self._settings.values)

    def gradient_norms(self, batch: Mapping[str, Any] | tuple[Any, ...]) -> dict[str, float]:
        """The norm of each term's gradient: what ``fxdistill.gradient_norms`` returns."""
        _require_gradients("gradient_norms")
        with unchanged(self._towers.every):
            return term_norms(self._request(self._sorted(*inputs_of(batch))))

    def summary(self) -> Summary:
        """Tables for ``rich.print``: the terms, and what each pass did to the last program."""
        told = (*self.matches.notes, *self._notes, *self._warnings)
        made, mode, steps = self._towers.beside.projections, self.options.mode, self._steps
        ran = steps.axes, steps.unweighed
        return summary(self.objective, made, self.program, mode, told, *ran)


def _require_gradients(what: str) -> None:
    if torch.is_inference_mode_enabled():
        raise StepError(
            f"{what} reads gradients, and torch.inference_mode() records none: call it outside of "
            "that (torch.no_grad() is no hindrance)"
        )


def averaging_ranks(module: nn.Module) -> Ranks | None:
    """The ranks over which a wrapper (DDP, FSDP2) averages gradients; ``None`` without one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    ranks: Ranks | None = parallel.wrappers.averaging_ranks(module)
    return ranks
