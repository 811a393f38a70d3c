"""What FSDP2 keeps about a module."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState


def class_behind(module: nn.Module) -> type:
    """The class that ``module`` had before ``fully_shard`` gave it one of its own."""
    bases = type(module).__bases__
    return bases[1] if bases[:1] == (FSDPModule,) and len(bases) == 2 else type(module)


def awaits(hook: Any) -> bool:
    """Whether FSDP2 asks to be called before the backward of a module's output."""
    return isinstance(getattr(hook, "__self__", None), FSDPState)


def sharded_parameters(modules: Iterable[nn.Module]) -> Iterator[tuple[Any, Any]]:
    """Each sharded parameter, and the group it is gathered with."""
    for module in modules:
        for group in _gathered_together(module._get_fsdp_state()):  # type: ignore[operator]
            yield from ((group, parameter) for parameter in group.fsdp_params)


def owners(parameter: Any) -> list[nn.Module]:
    """The modules that have the parameter: several, where it is tied."""
    info = parameter._module_info
    return [info.module, *info.shared_modules]


def sample_groups(module: FSDPModule) -> list[ProcessGroup]:
    """The groups over which the samples of an FSDP2 model lie."""
    info = next(
        group.mesh_info
        for m in module.modules()  # type: ignore[attr-defined]
        if isinstance(m, FSDPModule)
        for group in _gathered_together(m._get_fsdp_state())
    )
    names = ("shard_process_group", "replicate_process_group")
    return [getattr(info, name) for name in names if hasattr(info, name)]


def _gathered_together(state: Any) -> list[Any]:
    """One in torch 2.11, a list later."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
