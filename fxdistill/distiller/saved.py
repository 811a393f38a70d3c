"""What the state dict of a distiller holds: each tensor once, and the settings.

A tied head is saved as the embedding that it is: trainers save the state dict of a module that is
not of transformers with safetensors, which refuses tensors that share memory. Both forms load, with
every name or with the first of each tensor. The settings stand in the state dict's metadata, where
torch keeps the versions of modules: ``torch.save`` keeps them, safetensors has tensors only.
"""

from typing import Any

from torch import Tensor, nn

from fxdistill.distiller.settings import Settings

SETTINGS = "settings"


class Saved(nn.Module):
    """A module with settings, whose state dict has them and each tensor once."""

    _settings: Settings

    def save_each_tensor_once(self) -> None:
        """Let ``state_dict()`` have one name for each tensor, and load such state dicts."""
        self.register_state_dict_post_hook(_saving)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_loading)  # type: ignore[no-untyped-call]


def _saving(module: Saved, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Leave one name of each tensor in a state dict, and note the settings (a hook)."""
    for name, first in second_names(module).items():
        if prefix + first in state:
            state.pop(prefix + name, None)
    metadata[SETTINGS] = module._settings.saved()


def _loading(
    module: Saved, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *_others: Any
) -> None:
    """Give tensors of several names all of them, and take the settings (a hook)."""
    for name, first in second_names(module).items():
        if prefix + name not in state and prefix + first in state:
            state[prefix + name] = state[prefix + first]
    module._settings.restore(metadata.get(SETTINGS, {}))


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
