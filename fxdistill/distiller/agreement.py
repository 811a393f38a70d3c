"""How far student and teacher agree: the same prediction, and the divergence, over what counts."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fxdistill.base.tensors import on_every_rank
from fxdistill.distiller.modes import Request, Steps, eager
from fxdistill.distiller.settings import Settings
from fxdistill.errors import LogitsError
from fxdistill.losses.logits import forward_kl
from fxdistill.losses.names import aligns_labels, is_named
from fxdistill.models.devices import device_of
from fxdistill.objective.objective import Objective
from fxdistill.objective.term import LogitTerm

CHUNK = 2**24  # logits of one model that are in float32 at a time: 64 MiB
TOP1, DIVERGENCE = "top1", "divergence"


class Agreement(NamedTuple):
    """``top1``, the share of equal first choices, and ``divergence``, KL(teacher ‖ student)."""

    top1: Tensor
    divergence: Tensor


def agreement(request: Request, settings: Settings) -> Agreement:
    """Run the models of ``request`` as they are, in their modes, and compare their logits.

    The objective's own code says which predictions count: it gets two losses in place of its own.
    """
    towers, call = request.towers, request.call
    others = [tower for tower in towers.modules if tower != towers.main]
    if not request.objective.logits and not others:
        raise LogitsError(
            "agreement compares a student's logits with a teacher's, and there is no teacher"
        )
    pairs = request.objective.logits or _pairs_of(request)
    objective = _comparing(request.objective, pairs)
    at_one = Settings({**settings.values, "temperature": 1.0}, objective.names)
    batch = call.batch._replace(
        num_items=None, num_items_in_batch=None, num_feature_items=None, head_items=None
    )
    asked = replace(
        request,
        objective=objective,
        call=replace(call, batch=batch),
        settings=at_one.made(device_of(towers.main_module)),
    )
    with torch.no_grad():
        losses, _ = eager(asked, Steps())
    shares = {term.name: term.share for term in objective.logits}
    found = []
    for kind in (TOP1, DIVERGENCE):
        of_kind = {name: share for name, share in shares.items() if name.endswith(f"/{kind}")}
        parts = [losses.terms[name] * share for name, share in of_kind.items()]
        found.append(torch.stack(parts).sum() / sum(of_kind.values()))
    return Agreement(*found)


def _pairs_of(request: Request) -> tuple[LogitTerm, ...]:
    """Each model that learns and all others, in equal parts, where no loss compares logits."""
    objective, towers = request.objective, request.towers
    learning = (*(t.of[0] for t in objective.features), *(t.student for t in objective.labels))
    return tuple(
        LogitTerm(forward_kl, s, s, tuple(t for t in towers.modules if t != s), constant=True)
        for s in dict.fromkeys((towers.main, *learning))
    )


def _comparing(objective: Objective, pairs: Iterable[LogitTerm]) -> Objective:
    """The objective with both measures in place of the loss of each pair, and nothing else.

    Of the losses of labels there stay those that say of the labels' grid that it is another one.
    """
    terms = [
        replace(term, name=f"{term.name}/{kind}", loss=measure, module=None)
        for term in pairs
        for kind, measure in ((TOP1, equal_choices), (DIVERGENCE, divergence))
    ]
    aligning = [t for t in objective.labels if aligns_labels(t.loss) or not is_named(t.loss)]
    return replace(
        objective,
        features=(),
        heads=(),
        logits=tuple(terms),
        labels=tuple(aligning),
        importance=None,
        returns=None,
        returns_if_any=False,
    )


@contextlib.contextmanager
def evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """Put ``models`` in eval mode, and each of their modules back in its own mode."""
    modules = [module for model in models for module in model.modules()]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


# ------------------------------------------------------------------ the two measures


def equal_choices(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Tensor, weights: Tensor
) -> Tensor:
    """Σ w·[argmax z_S = argmax z_T] / Σ w, of logits ``[..., V]``; 0 where nothing counts."""

    def chosen(s: Tensor, t: Tensor, w: Tensor) -> Tensor:
        same = s.argmax(-1) == t.argmax(-1)
        return torch.where(same, w, 0).sum()

    return _mean_of_chunks(chosen, student_logits, teacher_logits, weights)


def divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Tensor, weights: Tensor
) -> Tensor:
    """Σ w·KL(p_T ‖ p_S) / Σ w at τ = 1, of logits ``[..., V]``; 0 where nothing counts."""

    def diverging(s: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return forward_kl(s, t, weights=w) * w.sum()

    return _mean_of_chunks(diverging, student_logits, teacher_logits, weights)


def _mean_of_chunks(
    total: Callable[[Tensor, Tensor, Tensor], Tensor], s: Tensor, t: Tensor, weights: Tensor
) -> Tensor:
    """Σ over chunks of predictions, divided by Σ w: copies in float32 are of one chunk."""
    s, t = (on_every_rank(x).flatten(0, -2) for x in (s, t))
    w = weights.flatten()
    size = max(1, CHUNK // max(1, s.shape[-1]))
    chunks = zip(s.split(size), t.split(size), w.split(size), strict=True)
    found = torch.stack([total(*chunk) for chunk in chunks]).sum()
    items = w.sum()
    return torch.where(items == 0, 0, found / torch.where(items == 0, 1, items))
