"""Warnings of padding that counts: in values that follow the text, and that its mask cannot weigh.

A model that pads inside, or that makes fewer places of a text, has values of another length than
its mask. So have latent vectors, which are as many for each text: the models are asked.
"""

from collections.abc import Iterable

import torch

from fxdistill.distiller import dry
from fxdistill.distiller.asking import Seen, by_multiples
from fxdistill.distiller.modes import Request, Steps
from fxdistill.objective.term import Term


@torch.compiler.disable  # type: ignore[untyped-decorator]
def warnings_of(request: Request, steps: Steps) -> list[str]:
    """What to warn of after a step, once for each match; the models are run on fake tensors."""
    new = {name: text for name, text in request.unweighed.items() if name not in steps.unweighed}
    steps.unweighed |= new.keys()
    terms = [term for term in request.objective.features if term.name in new]
    if not terms or dry.is_fake(request):
        return []
    follow = _that_follow(terms, request, steps)
    return [new[term.name] for term in follow]


def _that_follow(terms: list[Term], request: Request, steps: Steps) -> Iterable[Term]:
    """Those whose values change with the text: by multiples of its length, which padding shows."""
    seen = by_multiples(request, steps)
    if seen is None:
        return terms  # it cannot be told, so it is said
    return [term for term in terms if _follows(term, *seen)]


def _follows(term: Term, one: Seen, other: Seen) -> bool:
    """Whether the first sizes of a value change; with a layout, which may bring them there, any."""
    axes = None if any(term.layouts) else 2
    return any(
        end in one.values and one.values[end].shape[:axes] != other.values[end].shape[:axes]
        for end in term.taps
    )
