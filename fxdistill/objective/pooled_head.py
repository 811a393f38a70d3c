"""The module that ``Head(module="auto")`` makes: it pools a value, and maps it to classes."""

from typing import Any

from torch import Tensor, nn

from fxdistill.base.ranks import Ranks
from fxdistill.models.conventions import Task
from fxdistill.objective.tokens import Batch, attended
from fxdistill.objective.values import projected


class PooledHead(nn.Module):
    """A linear layer behind a mean over places or tokens, where the logits have none.

    Maps ``[B, C, H, W]`` are averaged over their places. Of values ``[B, L, D]`` the tokens that
    the attention mask has are averaged; with ``pools=False`` each token keeps its logits.
    """

    def __init__(self, width: int, classes: int, *, pools: bool, **factory: Any) -> None:
        super().__init__()
        self.pools = pools
        self.linear = nn.Linear(width, classes, **factory)

    def forward(self, value: Tensor, weights: Tensor | None = None) -> Tensor:
        """The logits of ``value``; ``weights`` ``[B, L]`` say which of its tokens count."""
        if self.pools and value.ndim > 3:
            value = value.flatten(2).mean(2)
        elif self.pools and value.ndim == 3:
            value = _mean(value, weights)
        made: Tensor = self.linear(value)
        return made


def _mean(value: Tensor, weights: Tensor | None) -> Tensor:
    """The mean over tokens; a sample without any that counts gives zeros."""
    if weights is None:
        return value.mean(1)
    total = (value * weights.unsqueeze(-1)).sum(1)
    return (total / weights.sum(1, keepdim=True).clamp(min=1)).to(value.dtype)


def made_logits(
    module: nn.Module, value: Tensor, batch: Batch, task: Task | None, ranks: Ranks | None
) -> Tensor:
    """What a head's module makes of a value; a ``PooledHead`` gets the attention mask."""
    mask = attended(batch) if task == "classification" else None
    fits = mask is not None and value.ndim == 3 and tuple(mask.shape) == tuple(value.shape[:2])
    if fits and mask is not None and isinstance(module, PooledHead):
        return projected(module, value, ranks, mask)
    return projected(module, value, ranks)
