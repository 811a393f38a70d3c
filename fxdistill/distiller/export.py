"""The student alone, as it is used without fxdistill: files that a model is loaded from."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fxdistill import parallel
from fxdistill.base.figures import size
from fxdistill.base.folders import HalfwayError, as_path, whole_folder
from fxdistill.base.tensors import is_lazy, is_placed
from fxdistill.errors import SaveError

MODEL, PROJECTIONS = "model.safetensors", "projections.safetensors"
FORMAT = {"format": "pt"}
EXTRA = "extra_state.json"  # what modules keep beside their tensors (get_extra_state)


def save_student(
    folder: Any, student: nn.Module, projections: nn.Module | None, names: Mapping[str, str]
) -> None:
    """Write ``student`` into ``folder``, whole or not at all, and ``projections`` beside it.

    ``names`` says in the header of the projections' file which match each of them is of. On a mesh
    every rank calls this: all gather, and the first writes. Raises SaveError, on every rank.
    """
    target = as_path(folder)
    state = _state(student)
    first = _rank() == 0
    error = _attempt(target, student, state, projections, names) if first else None
    if _sharded(student):
        error = parallel.checkpoints.everyone(error)[0]
    if error is not None:
        raise error


def _rank() -> int:
    """This process's rank; 0 without a process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0


def _attempt(
    target: Path,
    student: nn.Module,
    state: dict[str, Any],
    projections: nn.Module | None,
    names: Mapping[str, str],
) -> SaveError | None:
    """Write the files; what has gone wrong, if anything."""
    try:
        with whole_folder(target) as part:
            _write(part, student, state, projections, names)
    except SaveError as refused:
        return refused
    except (OSError, SafetensorError) as cause:
        tensors = [x for x in state.values() if isinstance(x, Tensor) and not is_lazy(x)]
        needed = sum(x.numel() * x.element_size() for x in tensors)
        before = "" if isinstance(cause, HalfwayError) else " What was there before is whole."
        error = SaveError(
            f"the student, {needed} bytes ({size(needed)}), could not be written to {target}"
            f"{_free(target)}: {cause}.{before}"
        )
        error.__cause__ = cause
        return error
    return None


def _write(
    part: Path,
    student: nn.Module,
    state: dict[str, Any],
    projections: nn.Module | None,
    names: Mapping[str, str],
) -> None:
    own: Any = getattr(student, "save_pretrained", None)
    if callable(own):
        # Sharded weights are gathered; otherwise the model finds its own, adapters alone, say.
        own(str(part), **({"state_dict": state} if _sharded(student) else {}))
    else:
        _write_state(state, part)
    if projections is not None:
        write_tensors(projections.state_dict(), part / PROJECTIONS, {**FORMAT, **names})


def _write_state(state: dict[str, Any], part: Path) -> None:
    """Write a state dict: its tensors, and what else modules keep in it as JSON beside them.

    Raises SaveError for what neither of the files can hold.
    """
    if lazy := [name for name, x in state.items() if is_lazy(x)]:
        raise SaveError(
            f"the student's {', '.join(lazy)} have no shape yet: their layers are lazy, and have "
            "not run. Save it after a step, or after distiller.warmup(**batch)."
        )
    others = {name: x for name, x in state.items() if not isinstance(x, Tensor)}
    for name, value in others.items():
        if not _is_json(value):
            raise SaveError(
                f"the student's {name!r} (of a module's get_extra_state) is a "
                f"{type(value).__name__} that JSON cannot hold, and nothing is pickled: return "
                "numbers, text, lists and dicts, or a tensor; or give the student a "
                "save_pretrained(folder) of its own"
            )
    write_tensors({k: x for k, x in state.items() if k not in others}, part / MODEL, FORMAT)
    if others:
        (part / EXTRA).write_text(json.dumps(others, allow_nan=False), "utf-8")


def _is_json(value: Any) -> bool:
    """Whether JSON gives the value back as it was."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError):
        return False


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors under all of their names: one that has two is written twice."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        x = tensor.detach().contiguous()
        pointer = x.untyped_storage().data_ptr()
        whole = x.untyped_storage().nbytes() == x.numel() * x.element_size()
        apart[name] = x if whole and pointer not in seen else x.clone()
        seen.add(pointer)
    save_file(apart, path, metadata=dict(metadata))


def _sharded(student: nn.Module) -> bool:
    return any(is_placed(p) for p in student.parameters())


def _state(student: nn.Module) -> dict[str, Any]:
    """The student's own state dict, of whole tensors, with what else its modules keep in it."""
    state: dict[str, Any] = student.state_dict()
    if not _sharded(student):
        return state
    return {name: x.full_tensor().cpu() if is_placed(x) else x for name, x in state.items()}


def _free(target: Path) -> str:
    while not target.exists() and target != target.parent:
        target = target.parent
    try:
        return f", {size(shutil.disk_usage(target).free)} are free there"
    except OSError:
        return ""
