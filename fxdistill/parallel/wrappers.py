"""Data parallel wrappers: over which ranks samples lie, and that gradients are averaged.

Private to torch and used here only: the DDP module whose forward is running
(``_get_active_ddp_module``), and of an FSDP2 module its state, the groups of parameters in it, the
modules that have a parameter, whether a group is sharded again after the forward, and the hook that
is to run before its backward (a method of ``FSDPState``). If they move, a distiller in DDP, or of a
``fully_shard``-ed student, fails in its first call.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.nn.parallel import DistributedDataParallel

from fxdistill.deferrable import DeferrableHead
from fxdistill.head import Unreadable
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


def head_in_fsdp(wrappers: Iterable[nn.Module], head: nn.Linear) -> DeferrableHead:
    """The head of a model whose ``wrappers`` are FSDP2's; Unreadable where logits must be made.

    FSDP2 gathers the head's weights before the module runs that owns them. After it they may be
    freed (asked when the head runs: the root decides in its first forward); else they live until
    the backward. Their gradient goes to FSDP2 through the gathered parameter.
    """
    owned = [(group, p) for group, p in _parameters(wrappers) if head in _owners(p)]
    if any(p.is_dtensor for _, p in owned):
        raise Unreadable("head is tensor parallel inside of fully_shard")
    groups = [group for group, _ in owned]

    def freed() -> bool:
        return any(group._reshard_after_forward for group in groups)

    return DeferrableHead(head, gathered=bool(owned), freed=freed, awaits=_awaits)


def class_behind(module: nn.Module) -> type:
    """The class that ``module`` had before ``fully_shard`` gave it one of its own."""
    bases = type(module).__bases__
    return bases[1] if bases[:1] == (FSDPModule,) and len(bases) == 2 else type(module)


def _awaits(hook: Any) -> bool:
    """Whether FSDP2 asks to be called before the backward of a module's output."""
    return isinstance(getattr(hook, "__self__", None), FSDPState)


def _parameters(modules: Iterable[nn.Module]) -> Iterator[tuple[Any, Any]]:
    """Each sharded parameter, and the group it is gathered with."""
    for module in modules:
        for group in _parameter_groups(module._get_fsdp_state()):  # type: ignore[operator]
            yield from ((group, parameter) for parameter in group.fsdp_params)


def _owners(parameter: Any) -> list[nn.Module]:
    """The modules that have the parameter: several, where it is tied."""
    info = parameter._module_info
    return [info.module, *info.shared_modules]


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
