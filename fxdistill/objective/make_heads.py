"""Make the modules of heads: those that were given, and pooled linear layers."""

from collections.abc import Mapping

from torch import nn

from fxdistill.errors import FxDistillError, ProjectionError, gather
from fxdistill.mapping.projections import structural_widths
from fxdistill.models.landmarks import logits_module_of, vocabulary_of
from fxdistill.models.structure import stacks_of
from fxdistill.models.tap import Tap, module_names
from fxdistill.models.weights import output_width
from fxdistill.objective.head import Head
from fxdistill.objective.make_terms import Shapes
from fxdistill.objective.objective import Objective
from fxdistill.objective.pooled_head import PooledHead
from fxdistill.objective.term import LOGITS, HeadTerm


def make_heads(
    objective: Objective,
    heads: Mapping[str, Head],
    student: nn.Module,
    shapes: Shapes,
    problems: list[FxDistillError],
) -> nn.ModuleDict:
    """The modules of heads by name; widths come from ``shapes``, or from the model's structure.

    A head whose module cannot be made is left out, and the error is added to ``problems``.
    """
    found = nn.ModuleDict()
    for term in objective.heads:
        module = heads[term.name].module
        if isinstance(module, nn.Module):
            found[term.name] = module
        elif module is not None:
            made = gather(problems, _pooled, term, objective, student, shapes)
            if made is not None:
                found[term.name] = made
    return found


def _pooled(term: HeadTerm, objective: Objective, student: nn.Module, shapes: Shapes) -> PooledHead:
    width, classes = _width(student, term.tap, shapes), _classes(student, shapes)
    if width is None or classes is None:
        what = "the width of its value" if width is None else "the number of the student's classes"
        raise ProjectionError(
            f"heads[{term.name!r}] with module='auto': {what} cannot be told from the model's "
            "structure. Give wrap(..., example_inputs={...}), from which it is read, or the module "
            "itself: module=nn.Linear(width, classes)."
        )
    parameter = next(student.parameters(), None)
    factory = {} if parameter is None else {"device": parameter.device, "dtype": parameter.dtype}
    logits = shapes.get((term.student, LOGITS))
    by_token = objective.task in ("causal_lm", "masked_lm", "seq2seq")
    pools = logits.ndim == 2 if logits is not None else not by_token
    return PooledHead(width, classes, pools=pools, **factory)


def _width(student: nn.Module, tap: Tap, shapes: Shapes) -> int | None:
    """The channels of a map, or the last axis of another value."""
    if (value := shapes.get(("student", tap))) is not None:
        return int(value.shape[1] if value.ndim == 4 else value.shape[-1])
    known = structural_widths(student)(tap, ()) if tap.path else None
    return None if known is None else known.size


def _classes(student: nn.Module, shapes: Shapes) -> int | None:
    """The number of classes, or of entries of the vocabulary, of the student's own logits."""
    if (logits := shapes.get(("student", LOGITS))) is not None:
        return int(logits.shape[-1])
    if (known := vocabulary_of(student)) is not None:
        return known
    stacks = stacks_of(student)
    path = logits_module_of(student, stacks)
    if path is None and not stacks:  # the last layer of a plain model; the first step checks it
        *_, path = module_names(student) or ("",)
        path = path if isinstance(student.get_submodule(path), nn.Linear) else None
    found = None if path is None else output_width(student.get_submodule(path))
    return None if found is None else found[0]
