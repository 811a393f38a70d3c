"""``load_checkpoint``: go on from a checkpoint, after every difference was looked for."""

import contextlib
import functools
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxdistill.base.folders import as_path
from fxdistill.base.tensors import is_placed
from fxdistill.base.warn import warn
from fxdistill.errors import FxDistillError, ResumeError, raise_together
from fxdistill.training.checkpoint import compare, sealed, tree, undoing
from fxdistill.training.checkpoint import folder as folders
from fxdistill.training.checkpoint import optimizer as optimizers
from fxdistill.training.checkpoint import rng as random_states
from fxdistill.training.checkpoint import tensors as stored
from fxdistill.training.checkpoint.contents import MODEL, Contents, Run, contents, run_of
from fxdistill.training.checkpoint.ranks import Party, party
from fxdistill.training.checkpoint.save import RANKS, TENSORS


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands: the steps that were done, and the ``data`` given when it was saved."""

    step: int
    data: Any


def load_checkpoint(
    folder: Any,
    distiller: Any,
    *,
    optimizer: Any = None,
    schedulers: Any = (),
    rng: bool = True,
) -> Checkpoint:
    """Restore the run that ``save_checkpoint`` saved; its losses go on bit for bit.

    The distiller is made as it was, by ``fxdistill.wrap`` with the same models and matches, and so
    are the optimizer and the schedulers. A frozen teacher, or base below adapters, is in no
    checkpoint: a warning says where it is another one, by its class, its path, or the shapes and
    some values of its parameters. Warnings also name functions of your own with other code, and
    modules of your own beside the models that keep other numbers or words.

    Whether the run is on a mesh, and on how many ranks, may differ from the run that was saved; on
    several ranks all of them call this. A rank that the saved run did not have keeps its random
    states, with a warning, and gets the first rank's data position.

    Args:
        folder: The folder given to ``save_checkpoint``, for its latest checkpoint; or one of the
            numbered checkpoints inside.
        distiller: The distiller to restore.
        optimizer: The optimizer to restore. Where one was saved and none is given, a warning says
            that it is left out; so with ``schedulers``.
        schedulers: The schedulers to restore, in the order in which they were saved.
        rng: Whether random states are restored; ``False`` leaves them alone.

    Returns:
        The step and the data position of the checkpoint.

    Raises:
        ResumeError: There is no checkpoint, a file of it is damaged (by its checksum), or it is of
            another run. The text lists every difference: in models, matches (in their order, where
            they have projections or losses that are modules), terms and options, in the names,
            shapes and dtypes of tensors, in optimizer and schedulers (an optimizer that was not
            saved is one). Or a scheduler or a module refuses its state. Nothing is changed then.
        OptionError: An argument is none of these.
    """
    run, here, target = run_of(distiller, optimizer, schedulers), party(), as_path(folder)
    now = contents(run)
    place, document = _together(here, lambda: _checked(target, now, here))
    for text in compare.left_out(document, now.document):
        warn(f"{place} has more than is restored: {text} was not asked for")
    for text in compare.doubts(document, now.document) if here.first else ():
        warn(f"{place}: {text}")
    own = _together(here, lambda: _own(place, document, here))
    found = _read(place, document, own, run, now, here)
    undo: list[Callable[[], None]] = []
    try:
        # The distiller comes last: no rank begins with it before all others are done with the rest.
        for restore in (_restore_beside, _restore_distiller):
            _together(here, functools.partial(restore, document, run, found, undo))
    except BaseException:  # here, on another rank, or by Ctrl-C
        for back in reversed(undo):
            back()
        raise
    if rng and own["random"] is not None:
        random_states.restore(own["random"])
    elif rng:
        warn(f"{place} has no random states for this rank: they stay")
    return Checkpoint(document["step"], tree.decode(own["data"], {}))


def _together(here: Party, act: Callable[[], Any]) -> Any:
    """``act()``, and its result; ResumeError on every rank where it fails on any."""
    error: FxDistillError | None = None
    result = None
    try:
        result = act()
    except FxDistillError as problem:
        error = problem
    here.agree(error, ResumeError)
    return result


def _checked(folder: Path, now: Contents, here: Party) -> tuple[Path, Any]:
    """The checkpoint and its document, which is of this run; ResumeError lists what is not."""
    place = folders.found(folder)
    document = _json(place / folders.CONTENTS)
    compare.require_format(document, str(place))
    sealed.require_whole(document, place, here)
    raise_together(compare.differences(document, now.document))
    return place, document


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ResumeError(f"{path} cannot be read: {error}") from error


def _own(place: Path, document: Any, here: Party) -> dict[str, Any]:
    """What this rank saved of its own; of a rank that was not there, the first one's data."""
    if here.rank < document["ranks"]:
        own: dict[str, Any] = _json(place / RANKS / f"{here.rank}.json")
        return own
    return {**_json(place / RANKS / "0.json"), "random": None, "buffers": []}


def _read(
    place: Path, document: Any, own: Any, run: Run, now: Contents, here: Party
) -> dict[str, Tensor]:
    """All tensors that are restored, each placed as it is here."""
    wanted, folder = _wanted(document, run, now), place / TENSORS

    def alone() -> dict[str, Tensor]:
        found = stored.read_plain(wanted, folder)
        if own["buffers"]:
            file = place / RANKS / f"{here.rank}.safetensors"
            found.update(stored.read_file(file, own["buffers"]))
        return found

    plain: dict[str, Tensor] = _together(here, lambda: _readable(place, alone))
    if not stored.has_shards(wanted, folder):
        return plain
    shards = functools.partial(stored.read_shards, wanted, folder, plain)
    return {**plain, **_together(here, lambda: _readable(place, shards))}


def _readable(place: Path, read: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    try:
        return read()
    except OSError as error:
        raise ResumeError(f"{place} cannot be read: {error}") from error


def _wanted(document: Any, run: Run, now: Contents) -> dict[str, stored.Wanted]:
    """The tensors to read, by name."""
    names = [name for name in document["tensors"] if name.startswith(MODEL)]
    if run.optimizer is not None:
        names += tree.tensors_in(document["optimizer"])
    if run.schedulers:
        names += tree.tensors_in(document["schedulers"])
    parameters = dict(run.distiller.named_parameters())
    wanted = {}
    for name in names:
        told = document["tensors"][name]
        dtype, like = getattr(torch, told["dtype"]), now.tensors.get(name)
        if not name.startswith(MODEL):
            like = _parameter_of(name, parameters)
        on_mesh = like is not None and is_placed(like)
        wanted[name] = stored.Wanted(told["shape"], dtype, like if on_mesh else None)
    return wanted


def _parameter_of(name: str, parameters: dict[str, Any]) -> Tensor | None:
    """The parameter that a tensor of an optimizer's state follows; ``None`` for counts of steps."""
    kind, _, path = name.partition("/")
    if kind != "optimizer" or path.endswith(".step"):
        return None
    while path and path not in parameters:
        path = path.rpartition(".")[0]
    found: Tensor | None = parameters.get(path)
    return found


def _restore_beside(
    document: Any, run: Run, tensors: dict[str, Tensor], undo: list[Callable[[], None]]
) -> None:
    """Restore the optimizer and the schedulers; ``undo`` gains what takes each of them back."""
    with _in_place():
        undo.append(undoing.of_settings(run.distiller))  # which a Schedule sets
        if run.optimizer is not None:
            saved = document["optimizer"]
            state = optimizers.decode(saved, run.optimizer, run.distiller, tensors)
            undo.append(undoing.of_optimizer(run.optimizer))
            optimizers.load(run.optimizer, state)
        for scheduler, told in zip(run.schedulers, document["schedulers"], strict=False):
            undo.append(undoing.of_scheduler(scheduler))
            scheduler.load_state_dict(tree.decode(told["state"], tensors))


def _restore_distiller(
    document: Any, run: Run, tensors: dict[str, Tensor], undo: list[Callable[[], None]]
) -> None:
    """Restore the distiller; ``undo`` gains what takes it back."""
    with _in_place():
        undo.append(undoing.of_distiller(run.distiller))
        run.distiller.load_state_dict(_model_state(document, run, tensors))


@contextlib.contextmanager
def _in_place() -> Iterator[None]:
    """Raise ResumeError for whatever goes wrong inside."""
    try:
        yield
    except Exception as error:
        raise ResumeError(f"the checkpoint could not be put in place: {error}") from error


def _model_state(document: Any, run: Run, tensors: dict[str, Tensor]) -> Any:
    """The distiller's state dict, with the versions of its modules and its settings."""
    now = run.distiller.state_dict()
    others = {name: tree.decode(value, {}) for name, value in document["others"].items()}
    own = {k.removeprefix(MODEL): v for k, v in tensors.items() if k.startswith(MODEL)}
    # What has no value yet, there as here, stays: a lazy layer that has not run.
    state = OrderedDict(now)
    state.update({**others, **own})
    state._metadata = tree.decode(document["metadata"], {})  # type: ignore[attr-defined]
    return state
