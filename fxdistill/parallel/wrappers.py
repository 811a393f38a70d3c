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
    inside = [ddp] if ddp is not None else []
    inside += [m for m in module.modules() if isinstance(m, DistributedDataParallel)]
    if inside:
        return _ranks([inside[0].process_group])
    sharded = next((m for m in module.modules() if isinstance(m, FSDPModule)), None)
    return None if sharded is None else _ranks(_fsdp_groups(sharded))


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


def _ranks(groups: list[ProcessGroup]) -> Ranks:
    size = 1
    for group in groups:
        size *= group.size()
    return Ranks(tuple(str(group.group_name) for group in groups), size, averaged=True)
