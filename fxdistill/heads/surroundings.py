"""Whether a head may run at the losses instead of where its model runs it.

Private to torch and used here only: ``_enter_autocast`` and ``_exit_autocast``, as dynamo writes
them into a graph. If they move, a head under an autocast of its own goes unnoticed, and
tests/passes/test_fuse_head.py fails.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from fxdistill.graph.effects import Effects
from fxdistill.heads.curve import Unreadable
from fxdistill.heads.read_head import Head


def require_same_surroundings(
    graph: fx.Graph, effects: Effects, stack: fx.Node, student: Head, teachers: Sequence[Head]
) -> None:
    """Raise Unreadable where a linear layer would compute something else at the losses.

    It moves there, so its inputs must not be written in between, and autocast must be the same.
    """
    modes = _modes(graph)
    named = [("student", student), *(("teacher", teacher) for teacher in teachers)]
    for tower, head in named:
        for value in head.inputs:
            if effects.written_after(value, head.linear, until=stack):
                raise Unreadable(f"{value.name} is written between the {tower}'s head and the loss")
        (autocast, _), (autocast_then, grad_then) = modes[head.linear], modes[stack]
        if autocast != autocast_then:
            raise Unreadable(f"the {tower}'s head runs under another autocast than the losses")
        if tower == "student" and any(modes[node][1] != grad_then for node in head.nodes):
            raise Unreadable("the student's head runs in another grad mode than the losses")


def _modes(graph: fx.Graph) -> dict[fx.Node, tuple[tuple[Any, ...], bool]]:
    """For every node, the autocasts that are entered there and the grad mode."""
    entered: dict[fx.Node, tuple[Any, ...]] = {}
    grad, found = torch.is_grad_enabled(), {}
    for node in graph.nodes:
        if node.target is _enter_autocast:
            entered[node] = tuple(node.args)
        elif node.target is _exit_autocast:
            entered.pop(node.args[0], None)
        elif node.target is torch._C._set_grad_enabled:
            grad = bool(node.args[0])
        found[node] = (tuple(entered.values()), grad)
    return found
