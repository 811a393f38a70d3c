"""Nested values as JSON, with their tensors beside it: what ``state_dict()`` returns, unpickled.

Numbers, text, ``None``, lists and dicts are what they are in JSON. What JSON lacks is a dict with
the key ``"$"``, which names its kind: tuples, sets, keys that are no text, numbers that are not
finite, bytes, dtypes and tensors, which are named only.
"""

import base64
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fxdistill.errors import OptionError

KIND = "$"
_SEQUENCES: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset}
_MAPPINGS: dict[str, Any] = {"dict": dict, "Counter": Counter, "OrderedDict": OrderedDict}


def encode(value: Any, keep: Callable[[str, Tensor], str], path: str) -> Any:
    """``value`` as JSON; ``keep(path, tensor)`` stores a tensor and returns its name.

    Raises OptionError, which names the path, for what is no data: nothing is pickled.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float, str)):
        return _scalar(value)
    if isinstance(value, Tensor):
        return {KIND: "tensor", "of": keep(path, value)}
    if isinstance(value, (bytes, bytearray)):
        return {KIND: "bytes", "of": base64.b64encode(value).decode("ascii")}
    if isinstance(value, torch.dtype):
        return {KIND: "dtype", "of": str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return _mapping(value, keep, path)
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        items = [encode(item, keep, f"{path}.{i}") for i, item in enumerate(value)]
        if isinstance(value, list):
            return items
        if isinstance(value, deque):
            return {KIND: "deque", "of": items, "maxlen": value.maxlen}
        kind = next(name for name, made in _SEQUENCES.items() if isinstance(value, made))
        return {KIND: kind, "of": items}
    raise OptionError(
        f"{path} is a {type(value).__name__}, which a checkpoint cannot hold: it has numbers, "
        "text, lists, dicts and tensors, and nothing is pickled"
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that ``encode`` was given, with the tensors of these names."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind, of = value.get(KIND), value.get("of")
    if kind is None:
        return {key: decode(item, tensors) for key, item in value.items()}
    if kind == "tensor":
        return tensors[str(of)]
    if kind == "float":
        return float(str(of))
    if kind == "bytes":
        return base64.b64decode(str(of))
    if kind == "dtype":
        return getattr(torch, str(of))
    items = decode(of, tensors)
    if kind == "deque":
        return deque(items, value["maxlen"])
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](items)
    return _MAPPINGS[kind](dict(items))


def tensors_in(value: Any) -> list[str]:
    """The names of the tensors of an encoded value."""
    if isinstance(value, list):
        return [name for item in value for name in tensors_in(item)]
    if not isinstance(value, dict):
        return []
    if value.get(KIND) == "tensor":
        return [str(value["of"])]
    return [name for item in value.values() for name in tensors_in(item)]


def no_tensors(path: str, value: Tensor) -> str:
    """Raise OptionError: what is encoded here is data alone. A ``keep`` for ``encode``."""
    raise OptionError(f"{path} is a tensor of shape {list(value.shape)}: give numbers (.tolist())")


def _scalar(value: float | str) -> Any:
    """A number or a text; also of numpy, whose types derive from Python's."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else {KIND: "float", "of": repr(number)}


def _mapping(value: Mapping[Any, Any], keep: Callable[[str, Tensor], str], path: str) -> Any:
    kind = type(value).__name__ if type(value).__name__ in _MAPPINGS else "dict"
    texts = all(isinstance(key, str) for key in value)
    if kind == "dict" and texts and KIND not in value:
        return {str(key): encode(item, keep, f"{path}.{key}") for key, item in value.items()}
    pairs = [
        [encode(key, no_tensors, f"{path}: a key"), encode(item, keep, f"{path}.{key}")]
        for key, item in value.items()
    ]
    return {KIND: kind, "of": pairs}
