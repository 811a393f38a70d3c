"""What a checkpoint holds of a run: its tensors by name, and a document that says the rest."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fxdistill
from fxdistill.base.tensors import is_lazy, is_placed
from fxdistill.distiller.distiller import Distiller
from fxdistill.distiller.saved import second_names
from fxdistill.errors import OptionError
from fxdistill.training.checkpoint import optimizer as optimizers
from fxdistill.training.checkpoint import tree
from fxdistill.training.checkpoint.code import PYTHON, code_of_all
from fxdistill.training.checkpoint.described import described, kept_by_modules
from fxdistill.training.checkpoint.targets import targets

FORMAT = 1
MODEL = "model/"  # before the names of the distiller's own tensors


class Run(NamedTuple):
    """What is saved and restored: a distiller, and what steps beside it."""

    distiller: Distiller
    optimizer: Any
    schedulers: tuple[Any, ...]


class Contents(NamedTuple):
    """The document, the tensors, and the names of those that each rank may have of its own."""

    document: dict[str, Any]
    tensors: dict[str, Tensor]
    buffers: tuple[str, ...]


def run_of(distiller: Any, optimizer: Any, schedulers: Any) -> Run:
    """The arguments, checked; raises OptionError for what has no state to save."""
    if not isinstance(distiller, Distiller):
        raise OptionError(
            f"distiller is a {type(distiller).__name__}: give what fxdistill.wrap returned (of a "
            "wrapper around it, such as DDP, its .module)"
        )
    several = isinstance(schedulers, Sequence)
    given = {"optimizer": optimizer} if optimizer is not None else {}
    if several:
        given.update({f"schedulers[{i}]": each for i, each in enumerate(schedulers)})
    for name, each in given.items():
        if not (hasattr(each, "state_dict") and hasattr(each, "load_state_dict")):
            raise OptionError(f"{name} is a {type(each).__name__}, which has no state_dict()")
    if not several:
        raise OptionError(f"schedulers is a {type(schedulers).__name__}: a list or a tuple of them")
    return Run(distiller, optimizer, tuple(schedulers))


def contents(run: Run) -> Contents:
    """What there is to save now. The tensors are those of the run, not copies."""
    tensors: dict[str, Tensor] = {}
    objective = run.distiller.objective

    def keep(path: str, tensor: Tensor) -> str:
        tensors[path] = tensor
        return path

    document = {
        "format": FORMAT,
        "made_by": {"fxdistill": fxdistill.__version__, "torch": str(torch.__version__)},
        "described": described(run.distiller),
        "kept_by_modules": kept_by_modules(run.distiller),
        "code": {"python": PYTHON, "of": code_of_all(run.distiller.matches, objective)},
        "targets": targets(run.distiller),
        **_model(run.distiller, tensors),
        "optimizer": None
        if run.optimizer is None
        else optimizers.encode(run.optimizer, run.distiller, keep),
        "schedulers": [
            {
                "class": type(scheduler).__name__,
                "state": tree.encode(scheduler.state_dict(), keep, f"schedulers/{i}"),
            }
            for i, scheduler in enumerate(run.schedulers)
        ],
    }
    document["tensors"] = {name: told(tensor) for name, tensor in tensors.items()}
    own = (MODEL + name for name, _ in run.distiller.named_buffers())
    buffers = tuple(name for name in own if name in tensors and not is_placed(tensors[name]))
    return Contents(document, tensors, buffers)


def _model(distiller: Distiller, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The distiller's own part of the document; its tensors go to ``tensors``."""
    state = distiller.state_dict()
    others: dict[str, Any] = {}
    lazy: list[str] = []
    for name, value in state.items():
        if is_lazy(value):
            lazy.append(name)  # its layer has not run yet: there is nothing to save
            continue
        if isinstance(value, Tensor):
            tensors[MODEL + name] = value.detach()
        else:
            others[name] = tree.encode(value, tree.no_tensors, name)
    metadata: dict[str, Any] = getattr(state, "_metadata", {})
    tied = {name: first for name, first in second_names(distiller).items() if first in state}
    return {
        "others": others,
        "lazy": lazy,
        "tied": tied,
        "metadata": tree.encode(dict(metadata), tree.no_tensors, "versions of modules"),
    }


def told(tensor: Tensor) -> dict[str, Any]:
    """The shape and the dtype of a tensor, for the document."""
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
