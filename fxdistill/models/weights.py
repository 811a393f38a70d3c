"""The weights of a model, by the widths that they map to each other.

``structure.py`` builds on this file. It reads only shapes and classes, so it works on meta tensors,
and on quantised or hand-written layers that keep a two-dimensional ``weight``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fxdistill.models.adapters import plain

WeightKind = Literal["linear", "convolution", "depthwise"]


@dataclass(frozen=True)
class Weight:
    """A leaf module that maps ``fan_in`` features to ``fan_out``; a convolution mixes positions."""

    path: str
    kind: WeightKind
    fan_in: int
    fan_out: int


def weight_of(module: nn.Module, path: str) -> Weight | None:
    """The weight that ``module`` itself is, below its adapters; ``None`` if it is none."""
    module = plain(module)
    if isinstance(module, _ConvNd):
        pointwise = all(k == 1 for k in module.kernel_size)
        depthwise = module.groups > 1 and module.groups == module.in_channels
        kind: WeightKind = "linear" if pointwise else "depthwise" if depthwise else "convolution"
        return Weight(path, kind, module.in_channels, module.out_channels)
    if isinstance(module, nn.Linear):
        return Weight(path, "linear", module.in_features, module.out_features)
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Embedding) or not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    if next(module.children(), None) is not None:
        return None
    out, into = weight.shape
    if getattr(module, "nf", None) == into:  # GPT-2's Conv1D keeps its weight transposed
        out, into = into, out
    return Weight(path, "linear", into, out)


def weights_in(module: nn.Module, path: str) -> list[Weight]:
    """All weights inside ``module``, in the order of their definition."""
    return [w for name, m in under(module, path) if (w := weight_of(m, name)) is not None]


def under(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """``module`` and all modules inside it, with full paths; a layer with adapters is one."""
    named = list(module.named_modules(prefix=path))
    adapted = tuple(f"{name}." for name, m in named if plain(m) is not m)
    yield from ((name, m) for name, m in named if not name.startswith(adapted))


def norm_width(module: nn.Module) -> int | None:
    """The width of a normalisation: a leaf whose parameters are vectors of one length."""
    parameters = list(module.parameters(recurse=False))
    if not parameters or next(module.children(), None) is not None:
        return None
    if weight_of(module, "") is not None or any(p.ndim != 1 for p in parameters):
        return None
    if len({p.numel() for p in parameters}) != 1 or not isinstance(
        getattr(module, "weight", parameters[0]), type(parameters[0])
    ):
        return None
    return parameters[0].numel()


def output_width(module: nn.Module) -> tuple[int, int] | None:
    """The width of a leaf's output, and the number of axes of its places.

    That number is 2 of a feature map ``[B, C, H, W]``, and 0 where the width is the last axis.
    """
    if (weight := weight_of(module, "")) is not None:
        return weight.fan_out, convolved_axes(module)
    if isinstance(embedding := plain(module), nn.Embedding):
        return embedding.embedding_dim, 0
    if (width := norm_width(module)) is not None:
        axes = next((axes for kinds, axes in _NORMS_OF_MAPS if isinstance(module, kinds)), 0)
        return width, axes
    return None


# A BatchNorm1d is not among them, since it mostly takes [B, C]. A GroupNorm or a SyncBatchNorm may
# have any axes, and mostly takes images; where shapes are known, these decide.
_NORMS_OF_MAPS: tuple[tuple[tuple[type[nn.Module], ...], int], ...] = (
    ((nn.InstanceNorm1d,), 1),
    ((nn.BatchNorm3d, nn.InstanceNorm3d), 3),
    ((nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm, nn.SyncBatchNorm), 2),
)


def is_channels_first(module: nn.Module) -> bool:
    """Whether a module's values of three axes are ``[B, C, L]``, as torch defines its class."""
    return isinstance(plain(module), _OF_CHANNELS) or convolved_axes(module) > 0


_OF_CHANNELS = (nn.BatchNorm1d, nn.InstanceNorm1d, nn.GroupNorm, nn.SyncBatchNorm)


def convolved_axes(module: nn.Module) -> int:
    """Over how many axes a convolution goes: 1, 2 or 3; 0 for any other module."""
    module = plain(module)
    return len(module.kernel_size) if isinstance(module, _ConvNd) else 0
