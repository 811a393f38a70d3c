"""The loss terms of one chunk of tokens, for students whose target the others' logits are."""

import ast
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxdistill.losses.fused.chunk import Chunk, ChunkSpec, chunk_terms, through_head
from fxdistill.losses.mixture import Pooled, mean_of_teachers


@dataclass(frozen=True)
class PeerSpec:
    """The constants of a compiled chunk.

    ``each`` are the constants of each student's terms, ``peers`` the numbers of the students that
    it learns from, ``pooled`` what of these the mean is of.
    """

    each: tuple[ChunkSpec, ...]
    peers: tuple[tuple[int, ...], ...]
    pooled: Pooled

    @property
    def text(self) -> str:
        """The spec as text, which an operator can take as an argument."""
        return repr((tuple(spec.text for spec in self.each), self.peers, self.pooled))

    @classmethod
    @functools.cache
    def read(cls, text: str) -> "PeerSpec":
        """Read a spec from its ``text``."""
        each, peers, pooled = ast.literal_eval(text)
        return cls(tuple(map(ChunkSpec.read, each)), peers, pooled)


def peer_terms(
    chunks: Sequence[Chunk], shares: Sequence[Tensor], spec: PeerSpec, want_gradient: bool
) -> Tensor:
    """What each token adds to both terms of each student, ``[K, 2, c]``.

    The chunks have no teacher. ``shares`` are the weights of each student's peers in their mean.
    The gradient by a student's logits overwrites them.
    """
    # Copies: the first student's gradient overwrites what the next one's target is made of.
    logits = [
        through_head(c.student.clone(), of.scales[0], of.softcaps[0])[0]
        for c, of in zip(chunks, spec.each, strict=True)
    ]
    found = []
    for i, (chunk, of) in enumerate(zip(chunks, spec.each, strict=True)):
        if of.divergences:
            chunk = chunk._replace(teacher=_target(logits, shares[i], chunk, i, spec))
        found.append(chunk_terms(chunk, of, want_gradient))
    return torch.stack(found)


def _target(logits: list[Tensor], share: Tensor, chunk: Chunk, i: int, spec: PeerSpec) -> Tensor:
    """The logits of student ``i``'s target, of the columns that are compared."""
    some = [logits[j][:, : spec.each[i].columns] for j in spec.peers[i]]
    if len(some) == 1:
        return some[0]
    return mean_of_teachers(some, share, temperature=chunk.settings[2], pooled=spec.pooled)
