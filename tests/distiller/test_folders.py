"""Files of models in folders: killed at every touch of the disk, and never a mixture of two."""

import os
import signal
import sys
from pathlib import Path

import pytest

from fxdistill.base.folders import HalfwayError, has_weights, whole_folder

# Every call that changes a folder: the process is killed before the n-th of them.
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
ONE = {"config.json": "same", "model.safetensors": "{}", "projections.safetensors": "{}"}
INDEX = "model.safetensors.index.json"
PIECES = tuple(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
SHARDS = dict.fromkeys(("config.json", *PIECES, INDEX), "{}")


def write(files: dict[str, str], tag: str, folder: Path) -> None:
    with whole_folder(folder) as part:
        for name, text in files.items():
            (part / name).write_text(text.format(tag))


def loaded(folder: Path) -> set[str]:
    """What a loader reads from a folder; nothing where it would refuse it."""
    single = (folder / "model.safetensors").exists()
    if not single and not (folder / INDEX).exists():
        return set()
    names = ("config.json", *(["model.safetensors"] if single else PIECES))
    tags = {(folder / name).read_text() for name in names}
    beside = folder / "projections.safetensors"
    return (tags | ({beside.read_text()} if beside.exists() else set())) - {"same"}


def killed(files: dict[str, str], folder: Path, count: int) -> bool:
    """Write ``files`` in a process that is killed before its n-th change; whether it was."""
    child = os.fork()
    if child == 0:
        left = [count]

        def hook(event: str, args: tuple[object, ...]) -> None:
            if event in CHANGES and args and str(folder.parent) in str(args[0]):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            write(files, "new", folder)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    ("old", "new", "always"),
    [(ONE, ONE, True), (SHARDS, SHARDS, False), (SHARDS, ONE, False)],
    ids=["one file", "shards", "shards to one"],
)
def test_a_kill_leaves_the_old_or_the_new_model(tmp_path, old, new, always):
    """Where one file changes: at any moment. Elsewhere at times none, until the next save."""
    seen, points = set(), 0
    while True:
        folder = tmp_path / str(points) / "out"
        write(old, "old", folder)
        (folder / "checkpoint-1").mkdir()
        (folder / "checkpoint-1" / "model.safetensors").write_text("theirs")
        (folder / "tokenizer.json").write_text("theirs")
        if not killed(new, folder, points):
            break
        tags = loaded(folder)
        assert len(tags) <= 1  # no mixture
        assert tags or not always
        seen |= tags
        with pytest.raises(ZeroDivisionError), whole_folder(folder):
            raise ZeroDivisionError  # the next save fails: it has gone on from the kill before
        (now,) = loaded(folder)
        assert not tags or tags in ({now}, {"old"})
        assert (folder / "checkpoint-1" / "model.safetensors").read_text() == "theirs"
        assert (folder / "tokenizer.json").read_text() == "theirs"
        assert has_weights(folder)
        assert not list(folder.glob(".*"))
        points += 1
    assert points > 8
    assert seen == {"old", "new"} or not always
    assert loaded(folder) == {"new"}
    names = {path.name for path in folder.iterdir()} - {"checkpoint-1", "tokenizer.json"}
    assert names == set(new)


def test_a_new_folder_appears_whole(tmp_path):
    points = 0
    while killed(ONE, tmp_path / str(points) / "out", points):
        folder = tmp_path / str(points) / "out"
        assert not folder.exists() or loaded(folder) == {"new"}
        write(ONE, "next", folder)
        assert [path.name for path in folder.parent.iterdir()] == ["out"]
        points += 1
    assert points > 4


def test_what_an_older_version_has_moved_away_is_put_back(tmp_path):
    """It renamed the old folder before the new one: a kill in between left no folder."""
    old = tmp_path / f".out.{'a' * 32}.old"
    old.mkdir()
    (old / "model.safetensors").write_text("old")
    (tmp_path / f".out.{'b' * 32}.part").mkdir()
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "out"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_text() == "old"


def test_a_move_that_fails_is_told_and_gone_on_with(tmp_path, monkeypatch):
    write(SHARDS, "old", tmp_path)
    real = os.replace

    def failing(a, b):
        if str(b).endswith(INDEX):
            raise OSError(5, "Input/output error")
        real(a, b)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(HalfwayError, match=r"Input/output error.*the next save into this folder"):
        write(SHARDS, "new", tmp_path)
    assert not has_weights(tmp_path)
    monkeypatch.setattr(os, "replace", real)
    write(SHARDS, "next", tmp_path)
    assert loaded(tmp_path) == {"next"}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(SHARDS)
