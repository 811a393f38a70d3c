"""The modules that a distiller trains beside its models: projections, and losses that are modules.

Terms name them by index, and a step is given them: so a traced step depends on their parameters and
modes, and not on the objective.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from fxdistill.base.ranks import Ranks, shared
from fxdistill.losses.names import Loss
from fxdistill.objective.term import HeadTerm, LabelTerm, LogitTerm, Term

AnyTerm = TypeVar("AnyTerm", Term, LogitTerm, LabelTerm)


class Beside(NamedTuple):
    """Projections of matches, losses with parameters or state of their own, modules of heads."""

    projections: nn.ModuleList
    losses: nn.ModuleList
    heads: nn.ModuleDict

    @classmethod
    def nothing(cls) -> "Beside":
        """No modules."""
        return cls(nn.ModuleList(), nn.ModuleList(), nn.ModuleDict())

    def loss_of(self, term: Term | LogitTerm | LabelTerm, ranks: Ranks | None) -> Loss:
        """What computes a term: its function, or its module, whose gradients ranks share."""
        if term.module is None:
            return term.loss
        return shared_by(self.losses[term.module], ranks)


def shared_by(module: nn.Module, ranks: Ranks | None) -> Callable[..., Any]:
    """``module`` as a function, whose parameters get the gradients of all ranks' samples."""
    if ranks is None or not ranks.projections:
        return module
    groups, scale = ranks.groups, ranks.scale

    def called(*args: Any, **kwargs: Any) -> Any:
        weights = {n: shared(p, groups, scale) for n, p in module.named_parameters()}
        return torch.func.functional_call(module, weights, args, kwargs)

    return called


def numbered(terms: Sequence[AnyTerm], losses: nn.ModuleList) -> tuple[AnyTerm, ...]:
    """The terms, with the index of the losses that are modules; ``losses`` gains what is new."""
    found = []
    for term in terms:
        if isinstance(term.loss, nn.Module):
            if all(term.loss is not known for known in losses):
                losses.append(term.loss)
            index = next(i for i, known in enumerate(losses) if known is term.loss)
            found.append(replace(term, module=index))
        else:
            found.append(term)
    return tuple(found)


def numbered_head(head: HeadTerm, losses: nn.ModuleList) -> HeadTerm:
    """The head, whose terms know the index of a loss that is a module."""
    logits = None if head.logits is None else numbered([head.logits], losses)[0]
    labels = None if head.labels is None else numbered([head.labels], losses)[0]
    return replace(head, logits=logits, labels=labels)
