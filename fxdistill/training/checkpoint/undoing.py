"""Take a part of a run back to where it was before a checkpoint that could not be put in place."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxdistill.base.tensors import is_lazy
from fxdistill.distiller.distiller import Distiller
from fxdistill.training.checkpoint import optimizer as optimizers

Undo = Callable[[], None]


def of_settings(distiller: Distiller) -> Undo:
    """Weights and temperature: those that were set by hand, too."""
    settings = distiller._settings
    values = dict(settings.values)

    def back() -> None:
        settings.values = values
        settings.forget()

    return back


def of_optimizer(optimizer: Any) -> Undo:
    """Its state, in the dtypes that it has."""
    state = optimizer.state_dict()  # of the tensors themselves: a load puts others there

    def back() -> None:
        optimizers.load(optimizer, state)

    return back


def of_scheduler(scheduler: Any) -> Undo:
    """What its state dict holds."""
    state = copy.deepcopy(scheduler.state_dict())

    def back() -> None:
        scheduler.load_state_dict(state)

    return back


def of_distiller(distiller: Distiller) -> Undo:
    """Its tensors, and what modules keep beside them.

    Copies are made only where code that is not torch's takes part in loading, which may raise: its
    tensors have the names, shapes and dtypes of the checkpoint, so torch's own does not.
    """
    if not any(map(_may_raise, distiller.modules())):
        return lambda: None
    state = distiller.state_dict(keep_vars=True)
    tensors = [t for t in state.values() if isinstance(t, Tensor) and not is_lazy(t)]
    copies = [t.detach().clone() for t in tensors]
    extras = [(m, copy.deepcopy(m.get_extra_state())) for m in _with_extras(distiller)]

    def back() -> None:
        with torch.no_grad():
            for tensor, copied in zip(tensors, copies, strict=True):
                tensor.copy_(copied)
        for module, extra in extras:
            module.set_extra_state(extra)

    return back


def _with_extras(distiller: Distiller) -> Iterator[nn.Module]:
    own = nn.Module.get_extra_state
    return (m for m in distiller.modules() if type(m).get_extra_state is not own)


def _may_raise(module: nn.Module) -> bool:
    """Whether code that is neither torch's nor ours loads a part of this module's state."""
    methods = ("_load_from_state_dict", "load_state_dict", "set_extra_state")
    code = [getattr(type(module), name) for name in methods]
    hooks = (module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks)
    code += [hook for each in hooks for hook in each.values()]
    places = [str(getattr(each, "__module__", "")).partition(".")[0] for each in code]
    return not all(place in ("torch", "fxdistill") for place in places)
