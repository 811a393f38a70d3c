"""The norm of each term's gradient, from one forward and a backward a term.

The total is linear in its weights, so its derivative by a weight is the term that the weight
multiplies, with its graph: ∂L/∂λ_logit = L_logit, and ∂L/∂w_i = loss_i·λ/N. These derivatives, not
the detached values that a step returns, are what is differentiated.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxdistill import parallel
from fxdistill.base.tensors import is_placed
from fxdistill.distiller.modes import Request, Steps, tapping
from fxdistill.distiller.step import step
from fxdistill.distiller.towers import Towers
from fxdistill.distiller.unchanged import unchanged
from fxdistill.errors import OptionError
from fxdistill.objective.objective import Objective
from fxdistill.objective.step_weights import StepWeights


def term_norms(request: Request) -> dict[str, float]:
    """‖∇L_k‖₂ over the parameters of the models that terms teach, for each unweighted term k.

    "features" is the mean over matches with their own weights, as in a step's losses. Raises
    OptionError where nothing learns, or where FSDP2 gathers the parameters.
    """
    towers, objective = request.towers, request.objective
    learning = _learning(towers, objective)
    with unchanged(towers.every), torch.enable_grad(), tapping(request, Steps(), capturing=False):
        weights = _leaves(StepWeights.of(request.settings.detach(), objective.names))
        given: Any = (request.call.inputs, request.call.batch, weights)
        losses, _ = step(towers, objective, *given)
        terms = _terms(losses.total, weights, objective)
        norms = [_norm(term, learning) for term in terms.values()]
    values = torch.stack(norms).tolist() if norms else []
    return dict(zip(terms, values, strict=True))


def _learning(towers: Towers, objective: Objective) -> list[nn.Parameter]:
    """The parameters of all models that are the student of a term."""
    students = {
        *(term.of[0] for term in objective.features),
        *(term.student for term in objective.logits),
        *(term.student for term in objective.labels),
        *(head.student for head in objective.heads),
    }
    models = [m for t, m in towers.modules.items() if t in students or t == towers.main]
    found = {id(p): p for m in models for p in m.parameters() if p.requires_grad}
    if any(hasattr(module, "unshard") for m in models for module in m.modules()):
        raise OptionError(
            "gradient_norms: FSDP2 (fully_shard) gathers parameters of the student, and forms "
            "their gradients in backward() only. Measure before fully_shard, or on one process."
        )
    if not found:
        raise OptionError("gradient_norms: no parameter of the student requires a gradient")
    return list(found.values())


def _leaves(weights: StepWeights) -> StepWeights:
    """Weights to differentiate by; the global ones are 1, so that the terms are unweighted.

    Those of heads are 0: the global weight multiplies a head too, whose part in it then is nothing.
    """

    def leaf(value: Tensor) -> Tensor:
        return value.detach().clone().requires_grad_()

    one = torch.ones_like(weights.logits)
    matches = tuple(map(leaf, weights.matches))
    heads = {name: leaf(torch.zeros_like(one)) for name in weights.heads}
    ones = {"logits": leaf(one), "features": leaf(one), "labels": leaf(one)}
    return weights._replace(**ones, matches=matches, heads=heads)


def _terms(total: Tensor, weights: StepWeights, objective: Objective) -> dict[str, Tensor]:
    """Each term with its graph; those that are not in the total, or learn nothing, are left out."""
    asked = {"logits": objective.logits, "labels": objective.labels, "features": objective.features}
    by = {name: getattr(weights, name) for name, terms in asked.items() if terms}
    by.update(zip(objective.weighed, weights.matches, strict=True))
    by.update(weights.heads)
    found = torch.autograd.grad(total, list(by.values()), create_graph=True, allow_unused=True)
    count = len(objective.weighed)
    return {
        name: term * count if name in objective.weighed else term
        for name, term in zip(by, found, strict=True)
        if term is not None and term.requires_grad
    }


def _norm(term: Tensor, learning: Sequence[nn.Parameter]) -> Tensor:
    found = torch.autograd.grad(term, learning, retain_graph=True, allow_unused=True)
    gradients = [g for g in found if g is not None]
    if not gradients:
        return torch.zeros((), device=term.device)
    if any(is_placed(g) for g in gradients):
        norm: Tensor = parallel.gradients.total_norm(gradients)
        return norm
    return torch.nn.utils.get_total_norm([g.float() for g in gradients])
