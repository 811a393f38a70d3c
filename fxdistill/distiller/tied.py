"""State dicts that hold each tensor once: a tied head is saved as the embedding that it is.

Trainers save the state dict of a module that is not of transformers with safetensors, which refuses
tensors that share memory. Both forms load: with every name, or with the first of each tensor.
"""

from typing import Any

from torch import Tensor, nn


def save_each_tensor_once(module: nn.Module) -> None:
    """Let ``module.state_dict()`` have one name for each tensor, and load such state dicts."""
    module.register_state_dict_post_hook(drop_second_names)
    module.register_load_state_dict_pre_hook(fill_second_names)


def drop_second_names(
    module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any
) -> None:
    """Leave one name of each tensor in a state dict: safetensors refuses shared memory.

    This is a hook of ``state_dict``. A tied head is the embedding; it is saved once.
    """
    for name in second_names(module):
        state.pop(prefix + name, None)


def fill_second_names(module: nn.Module, state: dict[str, Any], prefix: str, *_others: Any) -> None:
    """Give tensors of several names all of them, before a state dict is loaded (a hook)."""
    for name, first in second_names(module).items():
        if prefix + name not in state and prefix + first in state:
            state[prefix + name] = state[prefix + first]


def second_names(module: nn.Module) -> dict[str, str]:
    """The first name of each parameter or buffer that has more than one, by the others."""
    found: dict[int, str] = {}
    second = {}
    for name, value in _all_tensors(module):
        first = found.setdefault(id(value), name)
        if first != name:
            second[name] = first
    return second


def _all_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    parameters = module.named_parameters(remove_duplicate=False)
    return [*parameters, *module.named_buffers(remove_duplicate=False)]
