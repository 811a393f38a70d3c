"""Make the modules of heads: those that were given, and pooled linear layers."""

from collections.abc import Mapping

from torch import nn

from fxdistill.errors import FxDistillError, ProjectionError, gather
from fxdistill.mapping.projections import structural_widths
from fxdistill.models.landmarks import logits_module_of, vocabulary_of
from fxdistill.models.structure import stacks_of
from fxdistill.models.weights import output_width, weights_in
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
    *,
    guess: bool = False,
) -> nn.ModuleDict:
    """The modules of heads by name; widths come from ``shapes``, or from the model's structure.

    A head whose module cannot be made is left out, and the error is added to ``problems``. With
    ``guess``, the layer that is defined last, outside of lists, is taken for the classifier of a
    model that names none; the first step checks it.
    """
    found = nn.ModuleDict()
    for term in objective.heads:
        module = heads[term.name].module
        if isinstance(module, nn.Module):
            found[term.name] = module
        elif module is not None:
            made = gather(problems, _pooled, term, objective, student, shapes, guess)
            if made is not None:
                found[term.name] = made
    return found


def _pooled(
    term: HeadTerm, objective: Objective, student: nn.Module, shapes: Shapes, guess: bool
) -> PooledHead:
    width, classes = _width(student, term, shapes), _classes(student, shapes)
    if classes is None and guess:
        classes = _of_last_layer(student)
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
    return PooledHead(width, classes, pools=pools, channels=term.channels, **factory)


def _width(student: nn.Module, term: HeadTerm, shapes: Shapes) -> int | None:
    """The size of the axis that has the channels, or else the width that the structure tells."""
    value = shapes.get((term.student, term.tap))
    if value is not None and (value.ndim < 3 or term.channels is not None):
        return int(value.shape[1 if term.channels == 1 and value.ndim > 2 else -1])
    known = structural_widths(student)(term.tap, ()) if term.tap.path else None
    return None if known is None else known.size


def _classes(student: nn.Module, shapes: Shapes) -> int | None:
    """The number of classes, or of entries of the vocabulary, of the student's own logits."""
    if (logits := shapes.get(("student", LOGITS))) is not None:
        return int(logits.shape[-1])
    return vocabulary_of(student)


def _of_last_layer(student: nn.Module) -> int | None:
    """The classes of the layer behind a model's blocks, or of the last one of a plain model."""
    stacks = stacks_of(student)
    if (path := logits_module_of(student, stacks)) is not None:
        found = output_width(student.get_submodule(path))
        return None if found is None else found[0]
    weights = [] if stacks else weights_in(student, "")
    # Layers in lists behind it may be those of further heads.
    alone = [w for w in weights if not any(part.isdigit() for part in w.path.split("."))]
    if not weights:
        return None
    last = (alone or weights)[-1]
    return last.fan_out if isinstance(student.get_submodule(last.path), nn.Linear) else None
