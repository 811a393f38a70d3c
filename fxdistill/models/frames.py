"""Which frames of a speech model are padding: asked of the part of it that knows."""

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def frame_masks(model: nn.Module, attention_mask: Tensor) -> tuple[Tensor, ...]:
    """The masks ``[B, frames]`` of a speech model whose attention mask ``[B, samples]`` is given.

    The first is that of its output. Others are of the frames inside of it where these are more, or
    fewer: in front of an adapter that shortens them, or squeezed. Empty where no part tells.
    """
    part = next((m for m in model.modules() if _tells(m)), None)
    if part is None or attention_mask.ndim != 2:
        return ()
    known: Any = part
    masks = [_mask(known, attention_mask)]
    if "add_adapter" in _parameters(known._get_feature_vector_attention_mask):
        masks.append(_mask(known, attention_mask, add_adapter=False))
    masks += [_squeezed(mask, by) for mask in masks if (by := _squeeze(known)) > 1]
    return tuple({mask.shape[1]: mask for mask in reversed(masks)}.values())[::-1]


def _tells(part: nn.Module) -> bool:
    names = ("_get_feature_vector_attention_mask", "_get_feat_extract_output_lengths")
    return all(callable(getattr(part, name, None)) for name in names)


def _mask(part: Any, attention_mask: Tensor, **options: bool) -> Tensor:
    samples = torch.tensor(attention_mask.shape[1])
    frames = int(part._get_feat_extract_output_lengths(samples, **options))
    return cast(Tensor, part._get_feature_vector_attention_mask(frames, attention_mask, **options))


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _squeeze(part: Any) -> int:
    """How many frames SEW's encoder makes one of."""
    by = getattr(getattr(part, "config", None), "squeeze_factor", 1)
    return by if isinstance(by, int) else 1


def _squeezed(mask: Tensor, by: int) -> Tensor:
    """The mask of squeezed frames, as SEW's encoder makes it: one counts if any of its frames does.

    Frames that are left over at the end are in none.
    """
    if mask.shape[1] < by:
        return mask
    return F.max_pool1d(mask.float().unsqueeze(1), by, by).squeeze(1).to(mask.dtype)
