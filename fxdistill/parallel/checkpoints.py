"""Checkpoints of DTensors by torch's DCP, in its form of safetensors: each rank writes its shards.

That form has no pickled metadata (DCP's own has): where a shard lies stands in the header of its
file. A checkpoint loads onto any number of ranks, with any placements.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Replicate, empty


def everyone(value: Any) -> list[Any]:
    """The values of all ranks, on every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def write(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write the DTensors of all ranks into ``folder``; every rank calls this.

    Raises OSError, on every rank, where one of them could not write.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        raise OSError(_first(error)) from error


def read(targets: Mapping[str, Tensor], folder: Path) -> None:
    """Fill ``targets`` from the files in ``folder``: each rank reads what its own shards need.

    Every rank calls this, with its targets under the same names. Raises OSError, on every rank,
    where one of them could not read.
    """
    alone = not dist.is_initialized()
    with warnings.catch_warnings():
        # As is meant: a checkpoint of many ranks is read by one process.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        reader = HuggingFaceStorageReader(str(folder))
        try:
            load(dict(targets), storage_reader=reader, no_dist=alone)
        except CheckpointException as error:
            raise OSError(_first(error)) from error


def empty_like(shape: list[int], dtype: Any, like: Tensor) -> Tensor:
    """An empty DTensor placed like ``like``; replicated where the shape is another one."""
    assert isinstance(like, DTensor)
    same = list(like.shape) == shape
    kinds = like.placements if same else [Replicate()] * like.device_mesh.ndim
    made: Tensor = empty(*shape, dtype=dtype, device_mesh=like.device_mesh, placements=kinds)
    return made


def replicated(value: Tensor, like: Tensor) -> Tensor:
    """``value``, which all ranks have, as a DTensor on the mesh of ``like``."""
    assert isinstance(like, DTensor)
    here = value.to(like.to_local().device)
    made: Tensor = DTensor.from_local(here, like.device_mesh, [Replicate()] * like.device_mesh.ndim)
    return made


def _first(error: CheckpointException) -> str:
    """What went wrong on the first of the ranks where something did."""
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {type(cause).__name__}: {cause}"
