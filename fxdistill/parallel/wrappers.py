"""Data parallel wrappers: over which ranks samples lie, and that gradients are averaged.

Private to torch and used here only: the DDP module whose forward is running
(``_get_active_ddp_module``), and of an FSDP2 module its state, the groups of parameters in it, the
modules that have a parameter, whether a group is sharded again after the forward, and the hook that
is to run before its backward (a method of ``FSDPState``). If they move, a distiller in DDP, or of a
``fully_shard``-ed student, fails in its first call.
"""

from typing import Any

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from fxdistill.base.ranks import Ranks
from fxdistill.parallel.fsdp2 import sample_groups


def averaging_ranks(module: nn.Module) -> Ranks | None:
    """The ranks over which DDP or FSDP2 will average gradients; ``None`` where neither is."""
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
    """``around``: the wrapper is around the distiller, and has its projections too."""
    size = 1
    for group in groups:
        size *= group.size()
    names = tuple(str(group.group_name) for group in groups)
    return Ranks(names, size, averaged=True, projections=not around)
