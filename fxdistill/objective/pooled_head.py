"""The module that ``Head(module="auto")`` makes: it pools a value, and maps it to classes."""

from typing import Any

from torch import Tensor, nn

from fxdistill.base.figures import shown
from fxdistill.base.ranks import Ranks
from fxdistill.errors import ShapeError
from fxdistill.models.axes import ChannelAxis
from fxdistill.models.conventions import Task
from fxdistill.objective.term import HeadTerm
from fxdistill.objective.tokens import Batch, attended
from fxdistill.objective.values import projected
from fxdistill.taps.markers import check


class PooledHead(nn.Module):
    """A linear layer behind a mean over places or tokens, where the logits have none.

    Maps are averaged over their places. Of values ``[B, L, D]`` the tokens that the attention mask
    has are averaged; with ``pools=False`` each token keeps its logits. ``channels`` is the axis
    that the layer reads, 1 or -1; ``None``: the one of these that is as wide as the layer, and
    where both are, axis 1 of maps and the last of other values.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        *,
        pools: bool,
        channels: ChannelAxis | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.pools, self.channels = pools, channels
        self.linear = nn.Linear(width, classes, **factory)

    def forward(self, value: Tensor, weights: Tensor | None = None) -> Tensor:
        """The logits of ``value``; ``weights`` ``[B, L]`` say which of its tokens count."""
        value = value.movedim(1, -1) if self._axis(value) == 1 else value
        if self.pools and value.ndim > 3:
            value = value.flatten(1, -2).mean(1)
        elif self.pools and value.ndim == 3:
            value = _mean(value, weights)
        made: Tensor = self.linear(value)
        return made

    def _axis(self, value: Tensor) -> ChannelAxis:
        if value.ndim < 3:
            return -1
        first, last = (value.shape[axis] == self.linear.in_features for axis in (1, -1))
        if self.channels is not None or first == last:
            return self.channels or (1 if value.ndim > 3 else -1)
        return 1 if first else -1


def _mean(value: Tensor, weights: Tensor | None) -> Tensor:
    """The mean over tokens; a sample without any that counts gives zeros."""
    if weights is None:
        return value.mean(1)
    total = (value * weights.unsqueeze(-1)).sum(1)
    return (total / weights.sum(1, keepdim=True).clamp(min=1)).to(value.dtype)


def made_logits(
    head: HeadTerm,
    module: nn.Module,
    value: Tensor,
    batch: Batch,
    task: Task | None,
    ranks: Ranks | None,
) -> Tensor:
    """What a head's module makes of a value.

    A ``PooledHead`` gets the attention mask, and knows which axis of the value it reads.
    """
    if isinstance(module, PooledHead):
        _require_channels(head, module.linear.in_features, value, batch)
    mask = attended(batch) if task == "classification" else None
    fits = mask is not None and value.ndim == 3 and tuple(mask.shape) == tuple(value.shape[:2])
    if fits and mask is not None and isinstance(module, PooledHead):
        return projected(module, value, ranks, mask)
    return projected(module, value, ranks)


def _require_channels(head: HeadTerm, width: int, value: Tensor, batch: Batch) -> None:
    """Raise ShapeError unless one axis of the value is known to be the one that the layer reads."""
    axis, sizes = head.channels, (value.shape[1], value.shape[-1]) if value.ndim > 2 else ()
    if axis is None and sizes and sizes[0] != sizes[1]:
        axis = 1 if sizes[0] == width else -1
    if axis is None and value.ndim == 3 and (tokens := batch.tokens) is not None:
        axis = -1 if tokens.shape[:2] == value.shape[:2] else None
    require_width(head.name, width, value, axis)


@check
def require_width(name: str, width: int, value: Tensor, axis: ChannelAxis | None) -> None:
    """Raise ShapeError unless a layer of ``width`` can read that axis of a head's value."""
    advice = "give it the module itself: module=, which maps this value to logits"
    if axis is None and value.ndim > 2:
        raise ShapeError(
            f"head {name!r} with module='auto': whether axis 1 or the last of its value "
            f"{shown(value.shape)} has the channels cannot be told, because the student cannot be "
            f"run on inputs of another size; {advice}"
        )
    if value.ndim < 2 or value.shape[1 if axis == 1 else -1] != width:
        raise ShapeError(
            f"head {name!r} with module='auto' was made for values of width {width}, and this one "
            f"is {shown(value.shape)}: give wrap(..., example_inputs={{...}}), from which it is "
            f"read, or {advice}"
        )
