"""What a port selects from the inputs or the output of a module. Dynamo traces these functions."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

SELECTOR = re.compile(r"\[\d+\]|\.\w+")


def select(value: Any, port: str) -> Any:
    """What the selectors of ``port`` lead to, in the inputs or the output of a module.

    ``[i]`` selects an element, ``.field`` a field or key; one may follow another
    (``"output.mtp_logits[0]"``). Without selectors it is all of the value.
    """
    for selector in SELECTOR.findall(port):
        if selector.startswith("["):
            value = list(elements(value))[int(selector[1:-1])]
        else:
            name = selector[1:]
            value = value[name] if isinstance(value, Mapping) else getattr(value, name)
    return value


def tensors_at(value: Any, port: str) -> list[str]:
    """The ports of all tensors in what ``port`` selects, in order: of a list, its entries."""
    if isinstance(value, Tensor):
        return [port]
    if isinstance(value, (tuple, list)):
        parts = [(f"{port}[{i}]", part) for i, part in enumerate(value)]
    elif isinstance(value, Mapping):
        parts = [(f"{port}.{name}", part) for name, part in value.items()]
    elif hasattr(value, "__dataclass_fields__"):
        parts = [(f"{port}.{name}", getattr(value, name)) for name in value.__dataclass_fields__]
    else:
        parts = []
    return [found for name, part in parts for found in tensors_at(part, name)]


def elements(value: Any) -> Iterable[Any]:
    """What a tuple, a list, a mapping or a dataclass holds; nothing of other values."""
    if isinstance(value, (tuple, list)):
        return value
    if isinstance(value, Mapping):
        return value.values()
    if hasattr(value, "__dataclass_fields__"):
        return [getattr(value, name) for name in value.__dataclass_fields__]
    return ()


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in what a port selects: that of ``"output"`` and ``"input"``."""
    if isinstance(value, Tensor):
        return value
    for element in elements(value):
        if (found := first_tensor(element)) is not None:
            return found
    return None
