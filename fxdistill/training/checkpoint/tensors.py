"""The tensors of a checkpoint on disk: plain ones in one file, DTensors as shards of each rank."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxdistill import parallel
from fxdistill.base.tensors import is_placed

PLAIN = "plain.safetensors"


class Wanted(NamedTuple):
    """A tensor to read: its shape and dtype, and a tensor that says where it lies, if any does."""

    shape: list[int]
    dtype: torch.dtype
    like: Tensor | None = None


def write_file(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write plain tensors into one file of safetensors; raises OSError."""
    # safetensors refuses tensors that share memory or have gaps: these are copied.
    whole = {name: _apart(tensor.detach()) for name, tensor in tensors.items()}
    try:
        save_file(whole, path, metadata={"format": "pt"})
    except SafetensorError as error:  # the library's own class, for all that the disk refuses
        raise OSError(str(error)) from error


def read_file(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of these names on the CPU, in memory of their own; raises OSError."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in names}
    except SafetensorError as error:
        raise OSError(str(error)) from error


def apart(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The plain tensors, and the DTensors. Every rank calls this where there are DTensors.

    A 0-d tensor has no axis to shard: what a DTensor of that kind holds is the same everywhere.
    """
    whole = {k: _whole(t) for k, t in tensors.items() if not is_placed(t) or t.ndim == 0}
    return whole, {k: t for k, t in tensors.items() if k not in whole}


def read_plain(wanted: Mapping[str, Wanted], folder: Path) -> dict[str, Tensor]:
    """What a rank can read alone: all tensors, or the 0-d ones where shards are read or made."""
    names = [name for name, want in wanted.items() if not want.shape]
    return read_file(folder / PLAIN, names if has_shards(wanted, folder) else wanted)


def read_shards(
    wanted: Mapping[str, Wanted], folder: Path, plain: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What ``read_plain`` left out, and DTensors of what it read. Every rank calls this."""
    targets = {name: _empty(want) for name, want in wanted.items() if name not in plain}
    parallel.checkpoints.read(targets, folder)
    placed = {
        name: parallel.checkpoints.replicated(value, wanted[name].like)
        for name, value in plain.items()
        if wanted[name].like is not None
    }
    return {**placed, **targets}


def has_shards(wanted: Mapping[str, Wanted], folder: Path) -> bool:
    """Whether shards are read or made, here or on any rank."""
    alone = {path.name for path in folder.iterdir()} == {PLAIN}
    return not alone or any(want.like is not None for want in wanted.values())


def _empty(want: Wanted) -> Tensor:
    if want.like is None:
        return torch.empty(want.shape, dtype=want.dtype)
    made: Tensor = parallel.checkpoints.empty_like(want.shape, want.dtype, want.like)
    return made


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if is_placed(tensor) else tensor


def _apart(tensor: Tensor) -> Tensor:
    """A tensor that fills its memory alone, on any device."""
    owns = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if owns and tensor.is_contiguous() else tensor.clone().contiguous()


def mine(tensors: Mapping[str, Tensor], first: bool) -> dict[str, Tensor]:
    """What this rank writes of these tensors, as plain ones: whole, or its shards."""
    plain = {name: t for name, t in tensors.items() if first and not is_placed(t)}
    return {**plain, **{name: t.to_local() for name, t in tensors.items() if is_placed(t)}}


def size_of(tensors: Mapping[str, Any]) -> int:
    """The bytes of these tensors, whole."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
