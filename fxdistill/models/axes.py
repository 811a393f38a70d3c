"""Which axis of a value has its channels, where the module that returns it says so."""

from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from fxdistill.models.adapters import plain
from fxdistill.models.tap import Tap

ChannelAxis = Literal[1, -1]


def channel_axis(model: nn.Module, tap: Tap) -> ChannelAxis | None:
    """The axis by the kind of a leaf, whose places may be any; ``None`` where it does not tell."""
    if tap.port != "output" or tap.reads is not None:
        return None
    module = plain(model.get_submodule(tap.path))
    if isinstance(module, (_ConvNd, _BatchNorm, _InstanceNorm, nn.GroupNorm)):
        return 1
    if type(module) is nn.LayerNorm:  # a class that inherits from it may move axes before it
        return -1 if len(module.normalized_shape) == 1 else None
    return -1 if type(module) in (nn.Linear, nn.RMSNorm, nn.Embedding) else None
