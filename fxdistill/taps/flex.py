"""What ``flex_attention`` is called with, as the mask and the map that terms compare.

A ``BlockMask`` and a ``score_mod`` are functions of places. The mask that the first describes is
made as a tensor of truth values, ``[B, 1, Q, K]`` as a rule: as large as the one that the same
model gives to ``scaled_dot_product_attention``. A ``score_mod`` that changes scores (a softcap, a
bias) is no part of what ``Attention`` says, so that the map itself is made, ``[B, H, Q, K]``; its
gradient reaches what the function has captured, too.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as torchs
from torch.overrides import TorchFunctionMode

from fxdistill.base.tensors import wide

_TRANSFORMERS = "transformers.integrations.flex_attention"
_OF_TRANSFORMERS = "compile_friendly_flex_attention"
Place = tuple[dict[str, Any], str]  # names of a module, and one of these


def bound_to(modules: Iterable[nn.Module]) -> Iterator[Place]:
    """Where code that ``modules`` run calls ``flex_attention`` by name.

    These are the files of their classes, torch's own module, and transformers' one place for all
    of its models. A compiled ``flex_attention`` under a name of its own is found, too.
    """
    original = inspect.unwrap(torchs.flex_attention)
    yield vars(torchs), "flex_attention"
    of_hf = sys.modules.get(_TRANSFORMERS)
    if of_hf is not None and _OF_TRANSFORMERS in vars(of_hf):
        yield vars(of_hf), _OF_TRANSFORMERS
    files = {type(m).__module__ for module in modules for m in module.modules()}
    for name in files - {torchs.__name__, _TRANSFORMERS}:
        if (file := sys.modules.get(name)) is not None:
            for key, value in list(vars(file).items()):
                if isinstance(value, FunctionType) and inspect.unwrap(value) is original:
                    yield vars(file), key


def leaves_scores(score_mod: Callable[..., Tensor] | None, query: Tensor) -> bool:
    """Whether a ``score_mod`` is none, or returns the score that it is given."""
    if score_mod is None:
        return True
    score = query.new_zeros(())
    place = score.new_zeros((), dtype=torch.int32)
    with torch.no_grad(), _Gathering():  # a checkpoint around it must not see it
        return score_mod(score, place, place, place, place) is score


def mask_of(block_mask: Any, query: Tensor, key: Tensor) -> Tensor | None:
    """The keys that a query attends, ``[B or 1, H or 1, Q, K]``; ``None`` without a mask."""
    if block_mask is None:
        return None
    batch, heads = block_mask.kv_num_blocks.shape[:2]
    queries, keys = query.shape[2], key.shape[2]
    given = block_mask.mask_mod, batch, heads, queries, keys
    mask: Tensor = torchs.create_mask(*given, device=query.device)
    rows, columns = block_mask.BLOCK_SIZE
    if rows >= queries and columns >= keys:
        return mask  # one block, which says no more
    blocks: Tensor = block_mask.to_dense().bool()
    blocks = blocks.repeat_interleave(rows, 2)[:, :, :queries]
    return mask & blocks.repeat_interleave(columns, 3)[..., :keys]


def map_of(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float | None,
    score_mod: Callable[..., Tensor],
) -> Tensor:
    """The map ``[B, H, Q, K]``, whose scores ``score_mod`` changes; 0 where nothing is attended."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    by = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (wide(query) @ wide(key).transpose(-1, -2)) * by
    every: Any = score_mod
    for axis in (4, 3, 2, 1):  # keys innermost, then queries, heads and samples
        every = torch.vmap(every, (0, *(0 if i == axis else None for i in range(1, 5))))
    places = [torch.arange(size, device=query.device) for size in scores.shape]
    with _Gathering():
        scores = every(scores, *places)
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)


class _Gathering(TorchFunctionMode):
    """Let ``x[b, h]`` gather by tensors of no axis, which it would take for numbers to read.

    Torch has a mode like this one, whose gathering has no gradient in a captured graph.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            x, index = args
            index = index if isinstance(index, tuple) else (index,)
            if all(isinstance(i, (int, Tensor)) for i in index):
                at = [i if isinstance(i, Tensor) else _place(i, x) for i in index]
                return torch.ops.aten.index(x, at)
        return func(*args, **(kwargs or {}))


def _place(i: int, like: Tensor) -> Tensor:
    return torch.full((), i, dtype=torch.int64, device=like.device)
