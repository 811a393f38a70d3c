"""Read what FSDP2 keeps about a module.

Private to torch and used here only: the state of an FSDP2 module, the groups of parameters in it,
the modules that have a parameter, and the hook that runs before a module's backward (a method of
``FSDPState``); ``heads.find`` asks a group whether it is sharded again after the forward. If they
move, a distiller of a ``fully_shard``-ed student fails in its first call.
"""

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
    """Whether ``hook`` is FSDP2's, which has to run before a module's backward."""
    return isinstance(getattr(hook, "__self__", None), FSDPState)


def sharded_parameters(modules: Iterable[nn.Module]) -> Iterator[tuple[Any, Any]]:
    """Yield each sharded parameter as a pair: its group, which is gathered together, and itself."""
    for module in modules:
        for group in _gathered_together(module._get_fsdp_state()):  # type: ignore[operator]
            yield from ((group, parameter) for parameter in group.fsdp_params)


def owners(parameter: Any) -> list[nn.Module]:
    """The modules that have ``parameter``; several if it is tied."""
    info = parameter._module_info
    return [info.module, *info.shared_modules]


def sample_groups(module: FSDPModule) -> list[ProcessGroup]:
    """The process groups over which the samples of an FSDP2 model are split."""
    info = next(
        group.mesh_info
        for m in module.modules()  # type: ignore[attr-defined]
        if isinstance(m, FSDPModule)
        for group in _gathered_together(m._get_fsdp_state())
    )
    names = ("shard_process_group", "replicate_process_group")
    return [getattr(info, name) for name in names if hasattr(info, name)]


def _gathered_together(state: Any) -> list[Any]:
    """The groups of parameters gathered together: one at most in torch 2.11, a list later."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
