"""``save_checkpoint``: write a run to disk, whole or not at all."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fxdistill import parallel
from fxdistill.base.figures import size
from fxdistill.base.folders import as_path
from fxdistill.errors import FxDistillError, OptionError, SaveError
from fxdistill.training.checkpoint import folder as folders
from fxdistill.training.checkpoint import rng as random_states
from fxdistill.training.checkpoint import sealed, tree
from fxdistill.training.checkpoint import tensors as stored
from fxdistill.training.checkpoint.contents import Contents, contents, run_of
from fxdistill.training.checkpoint.ranks import Party, party

T = TypeVar("T")
TENSORS, RANKS = "tensors", "ranks"  # the folders of what all ranks have, and each of its own


def save_checkpoint(
    folder: Any,
    distiller: Any,
    *,
    optimizer: Any = None,
    schedulers: Any = (),
    step: int = 0,
    data: Any = None,
    rng: bool = True,
    keep: int = 2,
) -> Path:
    """Save a run, so that ``load_checkpoint`` goes on from here, bit for bit.

    Saved are the models that learn, projections, heads, losses with their state, all weights and
    the temperature; the optimizer, the schedulers, the random states of Python, numpy, torch and
    CUDA. Frozen models are not. Tensors are written as safetensors, a tied one once, and all else
    as JSON; nothing is pickled.

    ``folder`` holds numbered checkpoints, each whole, and the file ``latest``, which names one.
    After a crash, a kill or a full disk at any moment it holds the previous checkpoint or the new
    one. What a kill has left is removed by the next save. One run writes to a folder.

    On several ranks all of them call this, with a folder that all of them see. Sharded parameters
    (``mesh=``, FSDP2, other DTensors) are written by torch's DCP, each rank its shards. Random
    states, the data position and buffers that differ (a queue of CRD) are saved for each rank.

    Args:
        folder: Where the checkpoints of this run lie; it is made where it is not there.
        distiller: What ``fxdistill.wrap`` returned.
        optimizer: An optimizer of the distiller's parameters.
        schedulers: Schedulers, or what else has a ``state_dict()`` of plain data (a GradScaler, an
            ``fxdistill.Schedule``), in a list.
        step: The number of steps that were done.
        data: The position in the data, or whatever else the loop needs: any JSON value.
        rng: Whether random states are saved.
        keep: How many checkpoints the folder keeps; the oldest go.

    Returns:
        The folder of the new checkpoint.

    Raises:
        OptionError: An argument is none of these, or holds what is no data. Nothing is written.
        SaveError: The disk is full or read-only, say. It names the path and the bytes that are
            needed; on several ranks all of them raise it. What ``latest`` names is whole.
    """
    _check(step, keep)
    here, target = party(), as_path(folder)
    found = contents(run_of(distiller, optimizer, schedulers))
    own = {
        "data": tree.encode(data, tree.no_tensors, "data"),
        "random": random_states.captured() if rng else None,
    }
    found.document.update(step=int(step), ranks=here.size)
    differing = here.differing({name: found.tensors[name] for name in found.buffers})
    own["buffers"] = differing
    at = Target(target, sum(here.everyone(_bytes_of(found, differing, here))), here)
    part: Path | None = None
    try:
        part = at.by_first(functools.partial(_begin, target))
        _write_tensors(part, found, at)
        at.by_all(functools.partial(_write_own, part, found, own, here))
        seen = here.everyone(_files(part))  # and all ranks have written
        common = set(seen[0]).intersection(*seen)
        sums = here.everyone(at.by_all(functools.partial(sealed.sums, part, common, here)))
        at.by_first(functools.partial(_write_document, part, found, seen, sums))
        whole: Path = at.by_first(functools.partial(folders.publish, part, target, step, keep))
    except BaseException:
        if part is not None and here.first:
            folders.abandon(part)
        raise
    return whole


def _check(step: Any, keep: Any) -> None:
    for name, value, least in (("step", step, 0), ("keep", keep, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{name}={value!r}: an integer from {least}")


def _bytes_of(found: Contents, differing: list[str], here: Party) -> int:
    """The bytes of tensors that this rank writes."""
    own = stored.size_of({name: found.tensors[name] for name in differing})
    return own + stored.size_of(stored.mine(found.tensors, here.first))


class Target(NamedTuple):
    """Where a checkpoint goes, how many bytes of tensors it has, and the ranks that write it."""

    folder: Path
    needed: int
    here: Party

    def by_all(self, act: Callable[[], T]) -> T | None:
        """``act()`` on every rank; SaveError on every rank where it fails on any."""
        error: FxDistillError | None = None
        result = None
        try:
            result = act()
        except OSError as cause:
            error = _failed(self.folder, self.needed, cause)
            error.__cause__ = cause
        self.here.agree(error, SaveError)
        return result

    def by_first(self, act: Callable[[], T]) -> T:
        """``act()`` on the first rank; its result, or SaveError, on every rank."""
        result = self.by_all(act if self.here.first else lambda: None)
        found: T = self.here.of_first(result)
        return found


def _begin(target: Path) -> Path:
    part = folders.begin(target)
    for inside in (TENSORS, RANKS):
        (part / inside).mkdir()
    return part


def _write_tensors(part: Path, found: Contents, at: Target) -> None:
    """Write the tensors that all ranks have alike, and the shards of each."""
    plain, placed = stored.apart(found.tensors)
    folder = part / TENSORS
    at.by_first(functools.partial(stored.write_file, plain, folder / stored.PLAIN))
    if placed:
        at.by_all(functools.partial(parallel.checkpoints.write, placed, folder))


def _write_own(part: Path, found: Contents, own: dict[str, Any], here: Party) -> None:
    """Write what this rank has of its own."""
    if own["buffers"]:
        differing = {name: found.tensors[name] for name in own["buffers"]}
        stored.write_file(differing, part / RANKS / f"{here.rank}.safetensors")
    sealed.write_json(own, part / RANKS / f"{here.rank}.json")


def _files(part: Path) -> dict[str, int]:
    """The sizes of the files in ``part``, as this rank sees them."""
    files = [path for path in part.rglob("*") if path.is_file()]
    return {path.relative_to(part).as_posix(): path.stat().st_size for path in files}


def _write_document(
    part: Path, found: Contents, seen: list[dict[str, int]], sums: list[dict[str, int]]
) -> None:
    """Write the document, which has sizes and checksums of all ranks' files: they are there now."""
    sizes = _files(part)
    for rank, files in enumerate(seen):
        if apart := files.keys() - sizes.keys():
            raise OSError(
                f"rank 0 does not see what rank {rank} wrote ({min(apart)}): the folder must lie "
                "on a disk that all ranks share"
            )
    merged = {name: value for own in sums for name, value in own.items()}
    document = {**found.document, "files": sizes, "crc32": merged}
    sealed.write_json(sealed.sealed(document), part / folders.CONTENTS)


def _failed(target: Path, needed: int, cause: OSError) -> SaveError:
    """What could not be written where, and what is there instead."""
    there = target
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        free = f"{size(shutil.disk_usage(there).free)} are free there"
    except OSError:
        free = "how much is free there cannot be told"
    try:
        before = f"The latest checkpoint there, {folders.found(target).name}, is whole"
    except FxDistillError:
        before = "There is no checkpoint before it"
    return SaveError(
        f"a checkpoint of {needed} bytes ({size(needed)}) of tensors could not be written to "
        f"{target}, {free}: {cause}. {before}."
    )
