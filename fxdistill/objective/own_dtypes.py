"""Inputs in the dtype of the model that gets them, where models have different ones.

A teacher in bfloat16 beside a student in float32 is called with the student's inputs: many models
cast what they get, a convolution does not.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fxdistill.models.devices import device_of
from fxdistill.models.tap import Tower

Casts = list[tuple[torch.dtype, torch.dtype]]


def clashing_dtypes(models: Mapping[Tower, nn.Module]) -> dict[Tower, torch.dtype]:
    """The floating point dtype of each model, where models have different ones; else empty.

    A model's is that of its first parameter of such a dtype. Under autocast operators choose their
    dtypes themselves, and nothing clashes.
    """
    found = {tower: dtype for tower, model in models.items() if (dtype := _dtype_of(model))}
    if len(set(found.values())) < 2 or any(
        torch.is_autocast_enabled(device_of(model).type) for model in models.values()
    ):
        return {}
    return found


def cast(value: Any, to: torch.dtype, others: Collection[torch.dtype], made: Casts) -> Any:
    """``value`` with the tensors in it that have a dtype of ``others``, of other models, in ``to``.

    For each of them ``made`` gets its dtype before and after.
    """

    def in_own(x: Any) -> Any:
        if isinstance(x, Tensor) and x.dtype != to and x.dtype in others:
            made.append((x.dtype, to))
            return x.to(to)
        return x

    return tree_map(in_own, value)


def _dtype_of(model: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
