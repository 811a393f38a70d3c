"""What the state dict of a distiller holds: each tensor once, no frozen base, and the settings.

A tied head is saved as the embedding that it is: trainers save the state dict of a module that is
not of transformers with safetensors, which refuses tensors that share memory. Both forms load, with
every name or with the first of each tensor. Of a student with adapters, the adapters are saved and
not the frozen base below them, as PEFT saves them. The settings stand in the state dict's metadata,
where torch keeps the versions of modules: ``torch.save`` keeps them, safetensors has tensors only.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fxdistill.base.folders import as_path
from fxdistill.distiller.export import save_student
from fxdistill.distiller.settings import Settings
from fxdistill.distiller.towers import Towers
from fxdistill.models.adapters import base_parameters
from fxdistill.objective.objective import Objective

SETTINGS = "settings"


class Saved(nn.Module):
    """A module with settings, whose state dict has them and each tensor once."""

    _settings: Settings
    _towers: Towers
    objective: Objective

    def save_each_tensor_once(self) -> None:
        """Let ``state_dict()`` have one name for each tensor, and load such state dicts."""
        self.register_state_dict_post_hook(_saving)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_loading)  # type: ignore[no-untyped-call]

    def save_pretrained(self, folder: Any, projections: bool = False) -> None:
        """Save the student alone, as it is loaded without fxdistill.

        It is written by its own ``save_pretrained`` where it has one, so that ``from_pretrained``
        loads it (of a PEFT model, the adapters). Of another model, ``model.safetensors`` has the
        keys of the model that was never wrapped, for its ``load_state_dict``, and
        ``extra_state.json`` what its modules' ``get_extra_state`` returned, by the same keys. On a
        mesh all ranks call this, and the first one writes. Of ``fxdistill.mutual`` each student
        goes into a folder of its own, by its name ("student0").

        Old weights in ``folder`` go; other files there, such as a tokenizer's, and all folders in
        it stay. New files lie on the disk before the first of them is moved there. A new folder
        appears whole, and where a single file of weights changes, the folder has the old student
        or the new one at any moment. Elsewhere (shards, another configuration) a kill within the
        moves leaves it without weights, never with a mixture, and the next save first puts the
        rest in place.

        Args:
            folder: Where the student goes.
            projections: Whether ``projections.safetensors`` is written beside it. Its keys are
                those of ``distiller.projections``, and its header names the match of each.

        Raises:
            OptionError: ``folder`` is no path.
            SaveError: The disk is full or read-only, say, or the student has what no file holds.
                What was in ``folder`` is whole.
        """
        of = {t.projection: t.name for t in self.objective.features if t.projection is not None}
        names = {str(index): name for index, name in sorted(of.items())}
        beside = self._towers.beside.projections if projections else None
        for place, student in places(self, as_path(folder)):
            save_student(place, student, beside, names)


def places(module: Saved, folder: Path) -> list[tuple[Path, nn.Module]]:
    """Where each student goes: into the folder, or into one of its own where there are more."""
    several = module._modules.get("students")
    if several is None:
        return [(folder, module._towers.main_module)]
    ours = set(map(id, several.children()))
    return [(folder / t, m) for t, m in module._towers.modules.items() if id(m) in ours]


def _saving(module: Saved, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Leave one name of each tensor that is not of a base, and note the settings (a hook)."""
    for name, first in second_names(module).items():
        if prefix + first in state:
            state.pop(prefix + name, None)
    for name in _of_frozen_bases(module):
        state.pop(prefix + name, None)
    metadata[SETTINGS] = module._settings.saved()


def _loading(
    module: Saved, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *_others: Any
) -> None:
    """Put in what ``_saving`` has left out, and take the settings (a hook)."""
    for name, value in _of_frozen_bases(module).items():
        state.setdefault(prefix + name, value)
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


def _of_frozen_bases(module: nn.Module) -> dict[str, Tensor]:
    """The frozen parameters below adapters, by all of their names."""
    below = {i for child in module.children() for i in base_parameters(child)}
    named = module.named_parameters(remove_duplicate=False) if below else ()
    return {name: p for name, p in named if id(p) in below}


def _all_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    parameters = module.named_parameters(remove_duplicate=False)
    return [*parameters, *module.named_buffers(remove_duplicate=False)]
