"""The folder of a run's checkpoints: numbered, whole ones, and a pointer to the latest.

``000007-step-700/`` is written as ``.NAME.part`` and renamed once it lies on the disk. The file
``latest`` then names it, and is replaced in one move. What a kill leaves behind is either a
``.part``, or a whole checkpoint that ``latest`` does not name yet. The next save removes both: a
run that goes on from the latest one writes that checkpoint again.
"""

import contextlib
import logging
import os
import re
import shutil
import uuid
from pathlib import Path

from fxdistill.base.files import sync, write_whole
from fxdistill.errors import ResumeError

POINTER = "latest"
CONTENTS = "checkpoint.json"  # a folder with this file is a checkpoint
_NAME = re.compile(r"(\d+)-step-\d+")
_PART = re.compile(r"\.[0-9a-f]{32}\.part")  # also what base.files names what it writes
_logger = logging.getLogger("fxdistill.checkpoint")


def found(folder: Path) -> Path:
    """The checkpoint to load: ``folder`` itself if it is one, else its latest.

    Without a pointer (a kill during the very first save) it is the one with the highest number.
    Raises ResumeError where there is none, or the pointer names none.
    """
    if (folder / CONTENTS).is_file():
        return folder
    there = _numbered(folder)
    names = ", ".join(path.name for path in there.values()) or "none"
    try:
        name = (folder / POINTER).read_text("utf-8").strip()
    except FileNotFoundError:
        if there:
            return there[max(there)]
        what = "holds no checkpoint" if folder.is_dir() else "is no folder"
        raise ResumeError(
            f"{folder} {what}: fxdistill.save_checkpoint({str(folder)!r}, ...) writes one. A new "
            "run starts where the file 'latest' is not there."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ResumeError(f"{folder / POINTER} cannot be read: {error}. Whole: {names}.") from error
    target = folder / name
    if not _NAME.fullmatch(name) or not (target / CONTENTS).is_file():
        raise ResumeError(
            f"{folder / POINTER} names {name!r}, which is no checkpoint of this folder. Whole: "
            f"{names}; give the path of one."
        )
    return target


def begin(folder: Path) -> Path:
    """Remove what a kill has left, and make an empty folder for the files of a new checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in [path for path in folder.iterdir() if _PART.fullmatch(path.name)]:
        _remove(path)
    there, last = _numbered(folder), _pointed(folder)
    for number, path in there.items():
        if last is not None and number > last:
            _remove(path)
    part = _hidden(folder)
    part.mkdir()
    return part


def publish(part: Path, folder: Path, step: int, keep: int) -> Path:
    """Make ``part`` the latest checkpoint, and remove all but the newest ``keep``."""
    for path in part.rglob("*"):
        sync(path)
    sync(part)
    number = max(_numbered(folder), default=0) + 1
    target = folder / f"{number:06d}-step-{step}"
    part.rename(target)
    try:
        sync(folder)
        write_whole(folder / POINTER, f"{target.name}\n", durable=True)
    except BaseException:
        # The pointer may have been replaced before: then it names this one, which is whole.
        if not _may_name(folder, target):
            _remove(target)
        raise
    there = _numbered(folder)
    for old in sorted(there)[:-keep]:
        _remove_old(there[old])
    return target


def abandon(part: Path) -> None:
    """Remove the files of a checkpoint that failed."""
    with contextlib.suppress(OSError):  # the next save tries again
        shutil.rmtree(part)


def _numbered(folder: Path) -> dict[int, Path]:
    """The whole checkpoints by number, in order."""
    if not folder.is_dir():
        return {}
    matches = {path: _NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir()}
    return dict(sorted((int(match[1]), path) for path, match in matches.items() if match))


def _may_name(folder: Path, target: Path) -> bool:
    """Whether the pointer names ``target``, or cannot be read: then nothing is removed."""
    try:
        return (folder / POINTER).read_text("utf-8").strip() == target.name
    except FileNotFoundError:
        return False
    except (OSError, UnicodeDecodeError):
        return True


def _pointed(folder: Path) -> int | None:
    """The number that the pointer names; ``None`` without a pointer to a checkpoint."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        name = (folder / POINTER).read_text("utf-8").strip()
        if (match := _NAME.fullmatch(name)) and (folder / name / CONTENTS).is_file():
            return int(match[1])
    return None


def _hidden(folder: Path) -> Path:
    """A new name for what is not whole, or not any more."""
    return folder / f".{uuid.uuid4().hex}.part"


def _remove_old(path: Path) -> None:
    """Remove a checkpoint; a failure is logged only: the new one is whole."""
    try:
        _remove(path)
    except OSError as error:
        _logger.warning("an old checkpoint could not be removed: %s", error)


def _remove(path: Path) -> None:
    """Remove a folder; its name goes first, so that no half of a checkpoint looks like one."""
    gone = path
    if not _PART.fullmatch(path.name):
        gone = _hidden(path.parent)
        os.replace(path, gone)
    if gone.is_dir():
        shutil.rmtree(gone)
    else:  # a pointer that was half written
        gone.unlink()
