"""Heads whose logits nothing reads but what the fused form replaces."""

from collections.abc import Callable, Collection

import torch
from torch import fx

from fxdistill.heads.curve import Unreadable
from fxdistill.heads.read_head import Head, target_name, value_of

MANY_CLASSES = 4096  # logits [B, C] with as many are worth fusing


def read_as(tower: str, read: Callable[[fx.Node], Head], logits: fx.Node) -> Head:
    """The head of ``logits``; where ``read`` cannot read it, Unreadable says whose it is."""
    try:
        return read(logits)
    except Unreadable as why:
        raise Unreadable(f"the {tower}'s {why}") from None


def require_readers(tower: str, logits: fx.Node, allowed: Collection[fx.Node]) -> None:
    """Raise Unreadable if anything but ``allowed`` nodes reads the logits."""
    for reader in logits.users:
        if reader not in allowed:
            while reader.target == "detach" and len(reader.users) == 1:  # name the reader behind it
                reader = next(iter(reader.users))
            raise Unreadable(f"the {tower}'s logits are also read by {target_name(reader)}")


def require_vocabulary(logits: fx.Node) -> None:
    """Raise Unreadable for logits ``[B, C]`` of few classes, which cost little."""
    if value_of(logits).ndim < 3 and value_of(logits).shape[-1] < MANY_CLASSES:
        raise Unreadable(f"{[*value_of(logits).shape]} is classes, not a vocabulary")


def require_learns(head: Head) -> None:
    """Raise Unreadable for a student's head whose gradients cannot be formed in the forward."""
    if value_of(head.linear).dtype == torch.float16:
        raise Unreadable("in float16, gradients need a loss scale before they are formed")
    if head.detached:
        raise Unreadable("the student's logits are detached")
