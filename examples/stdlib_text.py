"""Real text that every machine has: the source of Python's own standard library, as tokens."""

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor

T = TypeVar("T")

# Installed packages and tests are not the library's own text; the last two are tables of data.
SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
}
END_OF_FILE = "<|endoftext|>"


class Text(NamedTuple):
    """Token ids, end to end. Whole files are held out, so that no file is on both sides."""

    train: Tensor
    heldout: Tensor
    digest: str


def load(folder: Path, vocabulary: int) -> Text:
    """The standard library, by a byte-level BPE of its training files; cached in ``folder``."""
    sources = [path.read_text("utf-8", errors="replace") for path in source_files()]
    heldout = sources[::20]
    train = [source for number, source in enumerate(sources) if number % 20]
    digest = hashlib.sha256("\0".join([str(vocabulary), *sources]).encode()).hexdigest()[:12]
    path = folder / f"stdlib-{digest}.pt"
    return Text(*cached(path, lambda: tokenize(train, heldout, vocabulary)), digest)


def source_files() -> list[Path]:
    """Every module of the standard library, always in the same order."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix())
    return [path for path in files if not SKIPPED & set(path.relative_to(root).parts)]


def tokenize(train: list[str], heldout: list[str], vocabulary: int) -> tuple[Tensor, Tensor]:
    """Learn the tokens on the training files, then encode both sides."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(train, vocabulary, special_tokens=[END_OF_FILE], show_progress=False)
    end = bpe.token_to_id(END_OF_FILE)

    def encode(sources: list[str]) -> Tensor:
        encoded = bpe.encode_batch(sources)
        return torch.tensor([token for source in encoded for token in [*source.ids, end]])

    return encode(train), encode(heldout)


def batches(ids: Tensor, batch: int, length: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Random windows of the text, ``[batch, length]`` a step; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(ids) - length + 1, (batch, 1), generator=generator)
        yield ids[starts + torch.arange(length)]


def windows(ids: Tensor, count: int, length: int) -> Tensor:
    """``count`` windows spread evenly over the text, ``[count, length]``."""
    starts = torch.linspace(0, len(ids) - length, count).long()
    return ids[starts[:, None] + torch.arange(length)]


def cached(path: Path, make: Callable[[], T]) -> T:
    """What ``make`` returns, kept in ``path``: written aside, then renamed, so never half there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        torch.save(make(), aside)
        aside.replace(path)
    result: T = torch.load(path)
    return result
