"""Write folders beside their place, and rename them when they are whole."""

import contextlib
import glob
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from fxdistill.base.files import sync

# What a model's save_pretrained writes: old pieces must not stay beside new ones.
_WEIGHTS = re.compile(
    r"(model|pytorch_model|adapter_model|projections)(-\d+-of-\d+)?"
    r"\.(safetensors|bin)(\.index\.json)?"
)


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """An empty folder for the body to fill, which then takes the place of ``target``.

    What else lies in ``target`` (a tokenizer, a card) is in the new folder too, before the body
    writes; old weights are not. If the body raises, ``target`` is as it was. Raises OSError.
    """
    place = Path(os.path.realpath(target))
    place.parent.mkdir(parents=True, exist_ok=True)
    for left in place.parent.glob(f".{glob.escape(place.name)}.*.part"):  # of a kill
        shutil.rmtree(left)
    name = f".{place.name}.{uuid.uuid4().hex}"
    part, old = place.with_name(f"{name}.part"), place.with_name(f"{name}.old")
    part.mkdir()
    try:
        if place.exists():
            shutil.copytree(place, part, dirs_exist_ok=True, ignore=_weights)
        yield part
        for path in part.rglob("*"):
            sync(path)
        sync(part)
        _swap(part, place, old)
        sync(place.parent)
    finally:
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)


def _swap(part: Path, place: Path, old: Path) -> None:
    """Put ``part`` in its place; what was there goes to ``old``, and comes back on an error."""
    if not place.exists():
        part.rename(place)
        return
    place.rename(old)
    try:
        part.rename(place)
    except BaseException:
        old.rename(place)
        raise


def _weights(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if _WEIGHTS.fullmatch(name)]
