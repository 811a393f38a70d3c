"""Capture a step without running it: for checks, for reports, for widths."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fxdistill.compiler import capture
from fxdistill.compiler.backend import Recipe
from fxdistill.distiller.modes import Request, Steps, captured_warm, tapping
from fxdistill.distiller.step import run_towers, step
from fxdistill.graph.halves import Halves
from fxdistill.graph.joint import JointProgram
from fxdistill.models.tap import Tap, Tower
from fxdistill.taps.table import TapTable


def captured(
    request: Request, steps: Steps, recipe: Recipe, *, cut: bool
) -> tuple[JointProgram, Halves | None, TapTable]:
    """Capture a step; with ``cut``, also partition it into forward and backward."""
    call = request.call
    given = (request.towers, request.objective, call.inputs, call.batch, request.settings)
    run = capture.dry_halves if cut else capture.dry_run
    with tapping(request, steps, capturing=True) as table:
        found = captured_warm(request.towers, lambda: run(step, recipe, table, *given))
        return *found, table


def tapped_shapes(request: Request, steps: Steps) -> Mapping[tuple[Tower, Tap], Tensor]:
    """The shapes of all matched values, as meta tensors; modules that do not run are left out."""
    objective = replace(request.objective, logits=(), labels=(), returns=None)
    request = replace(request, objective=objective)
    with tapping(request, steps, capturing=True) as table:
        given = (request.towers, objective, request.call.inputs)
        captured_warm(request.towers, lambda: capture.dry_values(run_towers, table, *given))
    return {
        end: torch.empty([int(size) for size in value.shape], device="meta")
        for end, value in table.values.items()
    }
