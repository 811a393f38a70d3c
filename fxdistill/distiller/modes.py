"""The three modes in which a step runs, one function for each: one graph, regional, eager.

All three take the same request and return the same result: the losses, and the logits if they were
asked for.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from fxdistill.base.attention import Attention
from fxdistill.compiler import capture
from fxdistill.compiler.backend import Recipe
from fxdistill.distiller.step import run_towers, step
from fxdistill.distiller.towers import Towers
from fxdistill.errors import CaptureError
from fxdistill.heads.curve import logits_from
from fxdistill.heads.find import Found, Meshes, deferrable, meshes_of, sharded_vocabularies
from fxdistill.heads.unmade import HeadInputs, as_loss_input, deferring
from fxdistill.models.fixed_sizes import fixed_sizes
from fxdistill.models.landmarks import head_path
from fxdistill.models.modes import buffers_kept_on_error
from fxdistill.models.recorders import install_recorders, is_of_cold_model
from fxdistill.models.tap import Tap, Tower
from fxdistill.objective.beside import Beside
from fxdistill.objective.call import Call
from fxdistill.objective.checks import verify
from fxdistill.objective.objective import Losses, Objective
from fxdistill.objective.term import LOGITS
from fxdistill.objective.tokens import Batch
from fxdistill.taps.attention import lookup
from fxdistill.taps.hooks import HookPlan, hooked
from fxdistill.taps.markers import named, verified
from fxdistill.taps.table import Expectations, TapTable, recording

T = TypeVar("T")
Result = tuple[Losses, Tensor | None]
Collected = Mapping[tuple[Tower, Tap], Tensor | Attention | HeadInputs]


@dataclass(frozen=True)
class Request:
    """One step to run."""

    towers: Towers
    objective: Objective
    call: Call
    settings: Tensor
    warned: list[str] = field(default_factory=list)  # the warnings of the step's checks
    unweighed: dict[str, str] = field(default_factory=dict)  # matches that no mask weighs, and why


class Steps:
    """The state that steps keep for later steps: compiled functions, and the paths of heads."""

    def __init__(self) -> None:
        self._compiled: list[tuple[str, Objective, Callable[..., Any]]] = []
        self._head_paths: dict[Tower, str | None] | None = None
        self.hooks: dict[Tower, HookPlan] = {}
        self._meshes: dict[Tower, tuple[int, Meshes]] = {}
        self.passed = False  # whether a step outside one-graph mode has passed its checks
        self.told = False  # whether it is known which matched values have tokens
        self.axes: dict[str, int] = {}  # how many axes the compared values have, by term
        self.labels_apart: bool | None = None  # whether labels have another grid, once sizes tell
        self.unweighed: set[str] = set()  # the matches whose values no mask has weighed
        self._fixed: frozenset[int] | None = None

    def compiled(
        self, function: Callable[..., Any], request: Request, recipe: Recipe, dynamic: bool | None
    ) -> Callable[..., Any]:
        """``function`` compiled as one graph for one objective; compiled at its first call.

        An objective never changes, so that the graph is right for it without looking at its terms;
        but a loss of the user's own may, and then dynamo has to look.
        """
        name, objective = function.__name__, request.objective
        for known, of, made in self._compiled:
            if known == name and of == objective:
                return made
        constant = "objective" if objective.unchanging else ""
        made = capture.one_graph(function, recipe, request.towers.dynamic(dynamic), constant)
        self._compiled.append((name, objective, made))
        return made

    def learn(self, table: TapTable) -> None:
        """Keep for later steps what one that has run tells."""
        self.axes.update(table.axes)
        if table.labels_apart is not None:
            self.labels_apart = table.labels_apart

    def fixed_sizes(self, towers: Towers) -> frozenset[int]:
        """The sizes that the models have fixed; read once."""
        if self._fixed is None:
            self._fixed = fixed_sizes(towers.modules.values())
        return self._fixed

    def head_paths(self, towers: Towers) -> dict[Tower, str | None]:
        """The path of each model's head, or ``None``; searched once."""
        if self._head_paths is None:
            self._head_paths = {t: head_path(model) for t, model in towers.modules.items()}
        return self._head_paths

    def meshes(self, towers: Towers) -> dict[Tower, Meshes]:
        """Where the parameters of each model lie; looked for again when a model has other ones."""
        for tower, model in towers.modules.items():
            first = id(next(model.parameters(), None))
            if self._meshes.get(tower, (None,))[0] != first:
                self._meshes[tower] = first, meshes_of(model)
        return {tower: self._meshes[tower][1] for tower in towers.modules}

    def __getstate__(self) -> dict[str, Any]:
        """The state of new ``Steps``: a copy has compiled nothing."""
        return Steps().__dict__


def in_one_graph(request: Request, steps: Steps, recipe: Recipe, dynamic: bool | None) -> Result:
    """Run models and terms as one compiled graph."""
    towers, call = request.towers, request.call
    run = steps.compiled(step, request, recipe, dynamic)
    with tapping(request, steps, capturing=True) as table:
        given = (towers, request.objective, call.inputs, call.batch, request.settings)
        result: Result = captured_warm(towers, lambda: run(table, *given))
        return result


def captured_warm(towers: Towers, run: Callable[[], T]) -> T:
    """Call ``run``, and again once transformers' hooks are in models that have never run."""
    try:
        return run()
    except CaptureError as error:
        if not is_of_cold_model(error) or not install_recorders(towers.modules.values()):
            raise
    return run()


def regional(
    request: Request, steps: Steps, recipe: Recipe, dynamic: bool | None, *, fuse: bool
) -> Result:
    """Run the models as they are, and the terms, with the fused head, as one compiled graph."""
    towers, objective, call = request.towers, request.objective, request.call
    heads = _heads(request, steps) if fuse else Found()
    recipe.journal.logits_made = heads.why_not
    with (
        tapping(request, steps, capturing=False),
        _buffers_kept(towers, steps),
        deferring(heads.heads) as waiting,
    ):
        anchor, given_logits = run_towers(towers, objective, call.inputs)
        if not given_logits:
            objective = replace(objective, returns=None, returns_if_any=False)
            request = replace(request, objective=objective)
        values = collect(objective)
    steps.passed = True
    terms = steps.compiled(terms_of, request, recipe, dynamic)
    expected = Expectations(labels_apart=steps.labels_apart)
    with recording(TapTable(capturing=True, expected=expected)) as table:
        given = (objective, values, call.batch, request.settings, towers.beside, anchor)
        losses, logits = terms(table, *given)
        steps.learn(table)
    waiting.hand_to(losses.total)
    return losses, logits


def eager(request: Request, steps: Steps) -> Result:
    """Run models and terms without compiling anything."""
    towers, call = request.towers, request.call
    with tapping(request, steps, capturing=False), _buffers_kept(towers, steps):
        given = (towers, request.objective, call.inputs, call.batch, request.settings)
        result = step(*given)
    steps.passed = True
    return result


def _buffers_kept(towers: Towers, steps: Steps) -> contextlib.AbstractContextManager[None]:
    """Restore the buffers of the models, which run before the checks, if the checks fail.

    Once the checks have passed, later steps keep no copies.
    """
    models = () if steps.passed else (*towers.modules.values(), *towers.beside)
    return buffers_kept_on_error(*models)


def _heads(request: Request, steps: Steps) -> Found:
    """The heads that may return stand-ins, because only the losses read their logits."""
    objective = request.objective
    if not objective.can_fuse or objective.returns is not None:
        return Found()
    paths = steps.head_paths(request.towers)
    return deferrable(request.towers.modules, paths, objective.with_logits)


@contextlib.contextmanager
def tapping(request: Request, steps: Steps, *, capturing: bool) -> Iterator[TapTable]:
    """Put hooks on all models for one call, and yield the table that they fill."""
    towers, objective = request.towers, request.objective
    meshes = steps.meshes(towers)
    placed = {tower: model for tower, model in towers.modules.items() if meshes[tower].placed}
    expected = Expectations(
        frozen=towers.frozen,
        vocabularies=sharded_vocabularies(placed, steps.head_paths(towers)),
        ranks={tower: meshes[tower].sizes for tower in towers.modules},
        grids=request.call.batch.grids,
        labels_apart=steps.labels_apart,
        verify=functools.partial(
            verify,
            objective.features,
            towers.beside.projections,
            alone=objective.learns_from_features_alone,
            on_ranks=objective.ranks is not None,
            others=[end for end in objective.of_heads if end[1] != LOGITS],
            batch=request.call.batch,
        ),
    )
    table = TapTable(capturing=capturing, expected=expected)
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(recording(table))
        for tower, model in towers.modules.items():
            taps = objective.taps_of(tower)
            plan = steps.hooks.setdefault(tower, HookPlan())
            placed_here = meshes[tower].placed
            hooks.enter_context(hooked(model, tower, taps, styles=placed_here, plan=plan))
        try:
            yield table
            request.warned.extend(table.warnings)
            steps.learn(table)
            request.unweighed.update(table.unweighed)
        except Exception:
            # A part that the user compiled wraps an error of a tap; the table has the original.
            if table.failure is not None:
                raise table.failure from None
            raise


def collect(objective: Objective) -> Collected:
    """The tapped values that the terms read; raises TapError where a module did not run."""
    verified()
    return {end: as_loss_input(lookup(*end)) for end in objective.reads}


def terms_of(
    objective: Objective,
    values: Collected,
    batch: Batch,
    settings: Tensor,
    beside: Beside,
    anchor: Tensor,
) -> Result:
    """Compute the objective on collected values. Regional mode compiles this function."""
    # Each once, so that the graph shows which terms read the same logits.
    made = {
        end: logits_from(*value) if isinstance(value, HeadInputs) else value
        for end, value in values.items()
    }

    def collected(tower: Tower, tap: Tap) -> Any:
        return made[tower, tap]

    losses = objective(collected, batch, settings, beside, anchor)
    returns = objective.returns
    logits = None if returns is None else collected(returns, LOGITS).detach()
    terms = {name: named(value, name) for name, value in losses.terms.items()}
    # torch 2.11 does not return a tuple that _replace has made in a compiled function.
    return Losses(losses.total, terms, losses.metrics), logits
