"""Data parallel wrappers: the ranks over which they split samples and average gradients.

Private to torch and used here only: the DDP module whose forward is running
(``_get_active_ddp_module``). If it moves, a distiller in DDP fails in its first call.
"""

from typing import Any

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from fxdistill.base.ranks import Ranks
from fxdistill.parallel.fsdp2 import sample_groups


def averaging_ranks(module: nn.Module) -> Ranks | None:
    """The ranks over which DDP or FSDP2 will average gradients; ``None`` without a wrapper."""
    ddp: Any = DistributedDataParallel._get_active_ddp_module()
    if ddp is not None:
        return _ranks([ddp.process_group], around=True)
    for inside in module.modules():
        if isinstance(inside, DistributedDataParallel):
            return _ranks([inside.process_group], around=False)
        if isinstance(inside, FSDPModule):
            return _ranks(sample_groups(inside), around=inside is module)
    return None


def _ranks(groups: list[ProcessGroup], *, around: bool) -> Ranks:
    """The ranks of ``groups``; with ``around``, the wrapper reduces projections as well."""
    size = 1
    for group in groups:
        size *= group.size()
    names = tuple(str(group.group_name) for group in groups)
    at = tuple(group.rank() for group in groups)
    return Ranks(names, size, averaged=True, projections=not around, positions=at)
