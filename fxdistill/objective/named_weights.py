"""Weights that a call brings by name: ``Match(weights="foreground")`` says which values they weigh.

A call's ``weights={"foreground": mask}`` has ``[B]`` for samples, or the leading axes of the value
(``[B, N]`` of anchors ``[B, N, 4]``), or the places of a map (``[B, H, W]`` of ``[B, C, H, W]``).
Of tokens that the model flattened, ``[B·L, D]``, they are ``[B]`` or ``[B, L]`` all the same.
They multiply the term's own weights.
"""

from collections.abc import Sequence

from torch import Tensor

from fxdistill.base.figures import shown
from fxdistill.errors import BatchError, did_you_mean
from fxdistill.objective.term import Term
from fxdistill.objective.tokens import Batch
from fxdistill.taps.markers import check


def check_names(terms: Sequence[Term], batch: Batch) -> None:
    """Raise BatchError where a call brings other names than the matches ask for."""
    asked = {term.weights for term in terms if term.weights is not None}
    given = set(batch.named or {})
    if missing := sorted(asked - given):
        raise BatchError(
            f"Match(weights={missing[0]!r}) needs distiller(..., weights={{{missing[0]!r}: ...}}), "
            f"and the call brings {', '.join(sorted(given)) or 'no weights'}."
        )
    if unused := sorted(given - asked):
        known = ", ".join(sorted(asked)) or "none does"
        near = f" Nearest: {did_you_mean(unused[0], sorted(asked))}." if asked else ""
        raise BatchError(
            f"weights={{{unused[0]!r}: ...}}: no match has that name in Match(weights=...) "
            f"({known}).{near}"
        )


def named_of(term: Term, value: Tensor, batch: Batch) -> Tensor | None:
    """The weights that the call brings for a term; ``None`` if it asks for none."""
    if term.weights is None or batch.named is None:
        return None
    named = batch.named[term.weights].to(value.device)
    require_axes(term.weights, named, value)
    if named.ndim == value.ndim == 2:
        named = named.flatten()  # of tokens that are flattened, too
    return named.float()


def times_named(weights: Tensor | None, term: Term, value: Tensor, batch: Batch) -> Tensor | None:
    """A term's own weights times those that the call brings for it."""
    named = named_of(term, value, batch)
    if named is None:
        return weights
    if weights is None:
        flat = named.ndim == 1 and named.shape[0] != value.shape[0]
        return named.repeat_interleave(value.shape[0] // named.shape[0]) if flat else named
    if weights.ndim == 1 and named.ndim == 1 and weights.shape != named.shape:
        # Tokens are flattened, [B·L], and the call weighs samples.
        named = named.repeat_interleave(weights.shape[0] // named.shape[0])
    axes = max(weights.ndim, named.ndim)
    long, short = (named, weights) if named.ndim == axes else (weights, named)
    return long * short.reshape(*short.shape, *(1,) * (axes - short.ndim))


def require_named(term: Term, values: Sequence[Tensor], batch: Batch) -> None:
    """Raise BatchError where the weights that a call brings fit one of two values, or none.

    Values that are compared as maps or by their samples may have other channels.
    """
    if term.weights is None or batch.named is None or term.compares == "anything":
        return
    for value in values:
        require_axes(term.weights, batch.named[term.weights], value)


@check
def require_axes(name: str, named: Tensor, value: Tensor) -> None:
    """Raise BatchError where weights are neither of the samples nor of places of the value."""
    shape, axes = tuple(value.shape), named.ndim
    leading = axes < len(shape) and tuple(named.shape) == shape[:axes]
    places = len(shape) > 3 and tuple(named.shape) == (shape[0], *shape[2:])
    flat = axes == 1 and len(shape) == 2 and shape[0] % max(1, named.shape[0]) == 0
    flat |= axes == len(shape) == 2 and named.numel() == shape[0]
    if axes == 0 or not (leading or places or flat):
        raise BatchError(
            f"weights {name!r} have shape {shown(named.shape)}, and weigh a value {shown(shape)}: "
            "they are those of samples [B], of its leading axes, of the tokens [B, L] that are "
            "flattened in it, or of the places of a map"
        )
