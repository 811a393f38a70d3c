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


def places_of_convolutions(block: nn.Module) -> int | None:
    """How many axes of places the output of a block has whose weights are all convolutions.

    Norms over channels may be among them. ``None``: other weights may have moved the channels.
    """
    weighed = [
        m for m in block.modules() if list(m.parameters(False)) and not isinstance(m, nn.PReLU)
    ]
    places = {len(m.kernel_size) for m in weighed if isinstance(m, _ConvNd)}
    if len(places) != 1 or any(channel_axis(m, Tap("")) != 1 for m in weighed):
        return None
    return places.pop()
