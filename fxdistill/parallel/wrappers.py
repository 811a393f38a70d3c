"""Data parallel wrappers: over which ranks samples lie, and that gradients are averaged.

Private to torch and used here only: the DDP module whose forward is running
(``_get_active_ddp_module``), and the groups in the state of an FSDP2 module. If they move, a
distiller in DDP, or of a ``fully_shard``-ed student, fails in its first call.
"""

from typing import Any

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from fxdistill.ranks import Ranks


def averaging_ranks(module: nn.Module) -> Ranks | None:
    """The ranks over which DDP or FSDP2 will average gradients; ``None`` where neither is."""
    ddp: Any = DistributedDataParallel._get_active_ddp_module()
    if ddp is not None:
        return _ranks([ddp.process_group], around=True)
    for inside in module.modules():
        if isinstance(inside, DistributedDataParallel):
            return _ranks([inside.process_group], around=False)
        if isinstance(inside, FSDPModule):
            return _ranks(_fsdp_groups(inside), around=inside is module)
    return None


def _fsdp_groups(module: FSDPModule) -> list[ProcessGroup]:
    info = next(
        group.mesh_info
        for m in module.modules()  # type: ignore[attr-defined]
        if isinstance(m, FSDPModule)
        for group in _parameter_groups(m._get_fsdp_state())
    )
    names = ("shard_process_group", "replicate_process_group")
    return [getattr(info, name) for name in names if hasattr(info, name)]


def _parameter_groups(state: Any) -> list[Any]:
    """One in torch 2.11, a list later."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _ranks(groups: list[ProcessGroup], *, around: bool) -> Ranks:
    """``around``: the wrapper is around the distiller, and has its projections too."""
    size = 1
    for group in groups:
        size *= group.size()
    names = tuple(str(group.group_name) for group in groups)
    return Ranks(names, size, averaged=True, projections=not around)
