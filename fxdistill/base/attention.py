"""What attention is computed from: queries, keys, values and mask. No map is in it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Attention(NamedTuple):
    """What ``scaled_dot_product_attention`` is called with, and so a map that nobody has to form.

    ``query`` is ``[B, H, Q, D]``, ``key`` and ``value`` ``[B, H, K, D]``, or of fewer heads, each
    of which serves as many of the queries' as follow each other. ``mask``, of truth values (True:
    attended) or added to the scores, broadcasts to ``[B, H, Q, K]``. ``causal`` lets a query attend
    the keys up to its own place. ``scale`` is 1/√D unless it is given.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    causal: Tensor | bool = False
    scale: Tensor | float | None = None


def each(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """``function`` of a tensor, or of every tensor that attention is computed from."""
    if not isinstance(x, Attention):
        return function(x)
    parts: list[Any] = [function(part) if isinstance(part, Tensor) else part for part in x]
    return Attention(*parts)


def tensors_of(x: Any) -> list[Tensor]:
    """The tensor, or those that attention is computed from."""
    return [part for part in (x if isinstance(x, Attention) else (x,)) if isinstance(part, Tensor)]


def of_queries(x: Tensor | Attention) -> Tensor:
    """A value whose first axes are those of the queries, ``[B, Q, ...]``, to find their tokens by.

    ``x`` is attention, a map ``[B, H, Q, K]``, or hidden states ``[B, Q, D]``.
    """
    if isinstance(x, Attention):
        return x.query[:, 0]
    return x[:, 0] if x.ndim == 4 else x
