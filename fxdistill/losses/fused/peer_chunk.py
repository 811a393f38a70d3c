"""The loss terms of one chunk of tokens, for students whose target the others' logits are."""

import ast
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fxdistill.base.tensors import wide
from fxdistill.losses.fused.chunk import Chunk, ChunkSpec, chunk_terms, through_head
from fxdistill.losses.mixture import Pooled, mean_of_teachers

PooledPeers = Pooled | Literal["each"]


@dataclass(frozen=True)
class PeerSpec:
    """The constants of a compiled chunk.

    ``each`` are the constants of each student's terms, ``peers`` the numbers of the students that
    it learns from. ``pooled`` says what of these the target is the mean of; with ``"each"`` the
    term is the mean of the divergences from each of them.
    """

    each: tuple[ChunkSpec, ...]
    peers: tuple[tuple[int, ...], ...]
    pooled: PooledPeers

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
        targets = _targets(logits, shares[i], chunk, i, spec) if of.divergences else []
        if len(targets) > 1:
            found.append(_from_each(chunk, targets, of, want_gradient))
        else:
            chunk = chunk._replace(teacher=targets[0] if targets else None)
            found.append(chunk_terms(chunk, of, want_gradient))
    return torch.stack(found)


def _targets(
    logits: list[Tensor], share: Tensor, chunk: Chunk, i: int, spec: PeerSpec
) -> list[Tensor]:
    """The logits of student ``i``'s targets, of the columns that are compared."""
    some = [logits[j][:, : spec.each[i].columns] for j in spec.peers[i]]
    if len(some) == 1 or spec.pooled == "each":
        return some
    return [mean_of_teachers(some, share, temperature=chunk.settings[2], pooled=spec.pooled)]


def _from_each(
    chunk: Chunk, targets: Sequence[Tensor], of: ChunkSpec, want_gradient: bool
) -> Tensor:
    """The terms ``[2, c]`` of one student, whose divergence is the mean over ``targets``."""
    share = chunk.logit_share / len(targets)
    terms = torch.zeros_like(torch.stack([share, share]))
    gradient = torch.zeros_like(wide(chunk.student))
    for target in targets:
        part = chunk._replace(student=chunk.student.clone(), teacher=target, logit_share=share)
        terms = terms + chunk_terms(part, of, want_gradient)
        gradient = gradient + part.student
        # Labels count once.
        chunk = chunk._replace(labels=None, label_share=torch.zeros_like(chunk.label_share))
        of = replace(of, labelled=False)
    if want_gradient:
        chunk.student.copy_(gradient)
    return terms
