"""Write the files of a model into a folder, so that no mixture of old and new ones can be loaded.

A folder that is not there yet is written beside its place and renamed. Into one that is there, the
new files go file by file: it may be the folder that a process stands in, a disk of its own, or hold
checkpoints. They are written into a hidden folder inside of it, ``.HEX.saving``, which is renamed
to ``.HEX.saved`` when all of it is on the disk: from here on the new files win. Where only one file
of weights differs, it is replaced in one move. Otherwise the old weights go first (the folder is
then called ``.HEX.placing``), configurations follow, and weights come last, their index at the very
end. A kill in between leaves a folder without weights, which nobody loads, and the next save first
goes on from there.
"""

import contextlib
import filecmp
import glob
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fxdistill.base.files import sync
from fxdistill.errors import OptionError

# What a model's save_pretrained writes: old pieces must not stay beside new ones.
_WEIGHTS = re.compile(
    r"((model|pytorch_model|adapter_model|projections)(-\d+-of-\d+)?"
    r"\.(safetensors|bin)(\.index\.json)?|extra_state\.json)"
)
_BESIDE = re.compile(r"projections\..*")  # no part of the model: it is whole without them
_CARD = "README.md"  # which PEFT reads, and writes again
_OURS = re.compile(r"\.[0-9a-f]{32}\.(saving|saved|placing)")


class HalfwayError(OSError):
    """New files are whole on the disk, and not all of them are in their places."""


def as_path(folder: Any, name: str = "folder") -> Path:
    """``folder`` as a path; OptionError for what is none."""
    try:
        return Path(folder)
    except TypeError:
        raise OptionError(f"{name}={folder!r}: the path of a folder, as text or a Path") from None


def has_weights(folder: Path) -> bool:
    """Whether the weights of a model lie in ``folder``, and nothing is on its way there."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return any(map(_is_core, names)) and not any(map(_OURS.fullmatch, names))


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder for the body to fill with the files of a model, which then go into ``target``.

    What else lies in ``target`` (a tokenizer, checkpoints in folders) stays where it is; old
    weights go. If the body raises, ``target`` is as it was. Raises OSError, and HalfwayError where
    a move has failed.
    """
    place = Path(os.path.realpath(target))
    place.parent.mkdir(parents=True, exist_ok=True)
    _put_back(place)
    into = _into_new if not place.exists() else _into_old
    with into(place) as part:
        yield part
        for path in part.rglob("*"):
            sync(path)
        sync(part)


@contextlib.contextmanager
def _into_new(place: Path) -> Iterator[Path]:
    """Fill a folder that is not there yet: it appears when it is whole."""
    part = place.with_name(f".{place.name}.{uuid.uuid4().hex}.part")
    part.mkdir()
    try:
        yield part
        part.rename(place)
        sync(place.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _into_old(place: Path) -> Iterator[Path]:
    """Fill a folder that is there: its new files are whole before the first of them is moved."""
    _finished(place)
    part = place / f".{uuid.uuid4().hex}.saving"
    part.mkdir()
    try:
        if (place / _CARD).is_file():
            shutil.copy2(place / _CARD, part)
        yield part
        part.rename(part.with_suffix(".saved"))
    finally:
        shutil.rmtree(part, ignore_errors=True)
    try:
        _finished(place)
    except KeyboardInterrupt:
        _finished(place)  # a few renames: nothing that is worth leaving half done
        raise


def _put_back(place: Path) -> None:
    """Remove what a kill has left beside ``place``, and put back what an older version moved away.

    Before there was a way to replace file by file, an old folder was renamed to ``.NAME.HEX.old``.
    """
    beside = f".{glob.escape(place.name)}.{'[0-9a-f]' * 32}"
    for left in place.parent.glob(f"{beside}.old"):
        if not place.exists():
            left.rename(place)
    for left in (*place.parent.glob(f"{beside}.old"), *place.parent.glob(f"{beside}.part")):
        shutil.rmtree(left)


def _finished(place: Path) -> None:
    """Put new files that are whole in their places, and remove those that are not."""
    try:
        for left in _left_in(place, "saving"):
            shutil.rmtree(left)
        for left in _left_in(place, "saved", "placing"):
            _put(left, place)
        sync(place)
    except OSError as error:
        if not place.is_dir() or not _left_in(place, "saved", "placing"):
            raise
        raise HalfwayError(
            f"{error}. The new files are whole, in a hidden folder inside of it, and the next save "
            "into this folder puts them in their places"
        ) from error


def _left_in(place: Path, *states: str) -> list[Path]:
    """Our hidden folders in ``place``."""
    ours = [path for path in place.iterdir() if _OURS.fullmatch(path.name)]
    return [path for path in ours if path.suffix[1:] in states]


def _put(new: Path, place: Path) -> None:
    """Move the files of ``new`` to ``place``; what was begun before is gone on with."""
    files = [path.relative_to(new) for path in new.rglob("*") if path.is_file()]
    files = [file for file in files if not _is_alike(file, new, place)]
    core = [file for file in files if _is_core(file.name)]
    last = [file for file in files if _BESIDE.fullmatch(file.name) or file.name == _CARD]
    rest = [file for file in files if file not in core and file not in last]
    if new.suffix == ".saved" and (core or rest):  # nothing was moved yet
        folders = {place / file.parent for file in (*core, *rest)}
        old = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
        _remove(path for path in old if _BESIDE.fullmatch(path.name) and _is_weights(path.name))
        weights = [path for path in old if _is_core(path.name)]
        if weights and (rest or weights != [place / file for file in core]):
            _remove(sorted(weights, key=_index_last, reverse=True))
            sync(place)
        if rest or len(core) > 1:
            new = new.rename(new.with_suffix(".placing"))
            sync(place)
    for several in (rest, sorted(core, key=_index_last), last):
        for file in several:
            (place / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(new / file, place / file)
        for folder in {place / file.parent for file in several}:
            sync(folder)
    shutil.rmtree(new)


def _is_alike(file: Path, new: Path, place: Path) -> bool:
    """Whether a file that is no weights is there already, with the same content."""
    there = place / file
    small = not _is_weights(file.name)
    return small and there.is_file() and filecmp.cmp(new / file, there, shallow=False)


def _is_weights(name: str) -> bool:
    return _WEIGHTS.fullmatch(name) is not None


def _is_core(name: str) -> bool:
    """Whether a file of this name is a part of the model's own weights."""
    return _is_weights(name) and not _BESIDE.fullmatch(name)


def _index_last(path: Path) -> bool:
    """A key for sorting: an index of shards says that all of them are there."""
    return path.name.endswith(".index.json")


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink()
