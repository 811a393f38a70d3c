"""Which matched values have tokens: asked of the models, on inputs of other lengths.

The sizes of a value may agree with those of the tokens by chance: an image of 16 patches beside a
text of 16 tokens. Where a model reads more than a text, all models are run on fake tensors with
texts of two other lengths; a value has tokens if its own length follows in both.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from fxdistill.distiller import dry
from fxdistill.distiller.modes import Request, Steps
from fxdistill.models.tap import Tap, Tower
from fxdistill.objective.call import Call, Inputs
from fxdistill.objective.objective import Objective
from fxdistill.objective.term import Term

End = tuple[Tower, Tap]
LENGTHS = 2  # chance agrees with one other length at most


def asks(objective: Objective, call: Call) -> bool:
    """Whether sizes cannot tell: a model reads more than a text, and a term leaves it open.

    A text-only model is not asked, though one with as many latent vectors as tokens would need it.
    """
    tokens = call.batch.tokens
    if tokens is None or objective.task == "seq2seq":
        return False
    if not any(term.has_tokens and not term.said_tokens for term in objective.features):
        return False
    given = [_named(inputs) for inputs in call.inputs.values()]
    reads_text = any(_is_text(name, x, tokens) for named in given for name, x in named.items())
    return reads_text and any(_is_more(name, x) for named in given for name, x in named.items())


def _named(inputs: Inputs) -> dict[str, Any]:
    return {**{str(i): value for i, value in enumerate(inputs.args)}, **inputs.kwargs}


def _is_text(name: str, value: Any, tokens: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[:2] != tokens.shape[:2]:
        return False
    return "embeds" in name or not (value.is_floating_point() or "mask" in name)


def _is_more(name: str, value: Any) -> bool:
    if not isinstance(value, Tensor) or value.ndim < 2 or not value.is_floating_point():
        return False
    return not ("mask" in name or "embeds" in name)


def told(request: Request, steps: Steps) -> tuple[tuple[Term, ...], str]:
    """The terms, with what their values are indexed by; and why that could not be told, or ``""``.

    A model that cannot run on fake tensors (because data decides its sizes) leaves the terms as
    they are: their values have tokens where their sizes agree.
    """
    terms = request.objective.features
    try:
        follows = _following(request, steps)
        return tuple(_told(term, follows) for term in terms), ""
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    names = ", ".join(term.name for term in terms if term.has_tokens and not term.said_tokens)
    return terms, (
        f"whose tokens index {names} is taken from their sizes, because the models cannot be run "
        f"on inputs of another length ({why}). Match(tokens=...) says it."
    )


def _told(term: Term, follows: Mapping[End, bool]) -> Term:
    if term.said_tokens or not term.has_tokens:
        return term
    ours, theirs = (follows.get(end, True) for end in term.taps)
    s, t = term.pools_tokens
    return replace(term, has_tokens=ours, pools_tokens=(s and ours, t and theirs))


def is_fake(request: Request) -> bool:
    """Whether there are no real models to run, as in a report of models without weights."""
    held = [p for model in request.towers.modules.values() for p in model.parameters()]
    inputs = tree_leaves([tuple(given) for given in request.call.inputs.values()])
    tensors = [x for x in (*held, *inputs) if isinstance(x, Tensor)]
    return any(isinstance(x, FakeTensor) or x.is_meta for x in tensors)


def _following(request: Request, steps: Steps) -> dict[End, bool]:
    """For every matched value, whether its length is that of its tokens, whichever that is."""
    batch, towers = request.call.batch, request.towers.modules
    sizes = {tower: _size(batch.of(tower).tokens) for tower in towers}
    step = -1 if min(length for _, length in sizes.values()) > LENGTHS else 1
    follows: dict[End, bool] = {}
    for more in (step * (i + 1) for i in range(LENGTHS)):
        given = request.call.inputs
        inputs = {t: _of_length(given[t], sizes[t], sizes[t][1] + more) for t in towers}
        shown = replace(request, call=replace(request.call, inputs=inputs))
        for end, value in dry.fake_values(shown, steps).items():
            batch_size, length = sizes[end[0]]
            follows[end] = follows.get(end, True) and _has(value, batch_size, length + more)
    return follows


def _size(tokens: Tensor | None) -> tuple[int, int]:
    assert tokens is not None
    return int(tokens.shape[0]), int(tokens.shape[1])


def _has(value: Tensor, batch: int, length: int) -> bool:
    """Whether an axis of the value is the tokens'; a layout may bring it to the front."""
    if value.ndim == 2:
        return value.shape[0] == batch * length
    return value.ndim > 2 and value.shape[0] == batch and length in value.shape[1:3]


def _of_length(inputs: Inputs, size: tuple[int, int], length: int) -> Inputs:
    args = [_resized(str(i), value, size, length) for i, value in enumerate(inputs.args)]
    return Inputs(
        tuple(args),
        {name: _resized(name, value, size, length) for name, value in inputs.kwargs.items()},
    )


def _resized(name: str, value: Any, size: tuple[int, int], length: int) -> Any:
    """A tensor like ``value`` whose axes of tokens (of ids, masks, positions) have ``length``."""
    if not isinstance(value, Tensor):
        return value
    shape = [int(n) for n in value.shape]
    if not _is_more(name, value):
        if tuple(shape[:2]) == size:
            shape[1] = length
        elif shape and shape[-1] == size[1]:
            shape[-1] = length  # positions [1, L] or [3, B, L], masks [B, 1, L, L]
            if len(shape) > 3 and shape[-2] == size[1]:
                shape[-2] = length
    return torch.empty(shape, dtype=value.dtype, device=value.device)
