"""The state of an optimizer by the names of its parameters, rather than by their numbers."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fxdistill.errors import OptionError
from fxdistill.training.checkpoint import tree


def groups_of(optimizer: Any, distiller: nn.Module) -> list[list[str]]:
    """The names of the parameters of each group; OptionError for one of another model."""
    names = {id(p): name for name, p in distiller.named_parameters()}
    found = []
    for i, group in enumerate(optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            if id(parameter) not in names:
                raise OptionError(
                    f"the optimizer's parameter {j} of group {i}, of shape "
                    f"{list(parameter.shape)}, is not among the distiller's: it would not be in "
                    "the checkpoint. Make optimizers of distiller.param_groups(), after wrap."
                )
        found.append([names[id(parameter)] for parameter in group["params"]])
    return found


def encode(
    optimizer: Any, distiller: nn.Module, keep: Callable[[str, Tensor], str]
) -> dict[str, Any]:
    """The class, the groups and the state of an optimizer, as JSON."""
    names, state = groups_of(optimizer, distiller), optimizer.state_dict()
    by_number = _by_number(names, state)
    entries = {by_number.get(key, key): value for key, value in state["state"].items()}
    options = [{k: v for k, v in g.items() if k != "params"} for g in state["param_groups"]]
    rest = {k: v for k, v in state.items() if k not in ("state", "param_groups")}
    return {
        "class": type(optimizer).__name__,
        "groups": names,
        "options": tree.encode(options, keep, "optimizer/groups"),
        "state": {k: tree.encode(v, keep, f"optimizer/{k}") for k, v in entries.items()},
        "rest": tree.encode(rest, keep, "optimizer/rest"),
    }


def decode(
    saved: Any, optimizer: Any, distiller: nn.Module, tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The state dict for ``optimizer``, whose groups have the saved parameters, in any order."""
    now = optimizer.state_dict()
    numbers = {name: i for i, name in _by_number(groups_of(optimizer, distiller), now).items()}
    options = tree.decode(saved["options"], tensors)
    groups = zip(options, now["param_groups"], strict=True)
    state = {numbers.get(k, k): tree.decode(v, tensors) for k, v in saved["state"].items()}
    return {
        **tree.decode(saved["rest"], tensors),
        "state": state,
        "param_groups": [{**kept, "params": here["params"]} for kept, here in groups],
    }


def load(optimizer: Any, state: dict[str, Any]) -> None:
    """Load a state dict whose tensors keep their dtypes: torch casts them to their parameter's."""
    optimizer.load_state_dict(state)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [i for group in state["param_groups"] for i in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, saved in state["state"].get(number, {}).items():
            loaded = optimizer.state[parameter].get(key)
            both = isinstance(saved, Tensor) and isinstance(loaded, Tensor)
            if both and saved.dtype != loaded.dtype:
                optimizer.state[parameter][key] = saved.to(loaded.device)


def _by_number(names: list[list[str]], state: Mapping[str, Any]) -> dict[Any, str]:
    """The names of parameters by the numbers that a state dict has for them."""
    groups = zip(state["param_groups"], names, strict=True)
    return {
        number: name
        for group, own in groups
        for number, name in zip(group["params"], own, strict=True)
    }
