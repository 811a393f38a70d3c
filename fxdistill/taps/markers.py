"""Markers: read values out of a running model without changing the model.

Three markers do the work. ``begin(section)`` says which model or part the next operators belong to,
``tap(x, ...)`` names a value inside a model, and ``tapped(...)`` returns that value outside of it.
In eager mode they write to and read from a table of real tensors. When dynamo traces them, they
stay in the graph as single calls (``allow_in_graph``) and the table holds fake tensors, so that the
traced objective knows shapes and dtypes; passes then replace ``tapped`` by the value itself and
return it from checkpointed regions. Dynamo sees no side effects in the markers, so they may be
inside such regions.

``tap`` is a plain function rather than a custom operator: an operator may not return its argument,
and would need a sharding rule for every placement.
"""

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from fxdistill import taps
from fxdistill.base.figures import shown
from fxdistill.base.nodes import one_node
from fxdistill.base.tensors import is_placed
from fxdistill.errors import CheckpointError, FxDistillError, LogitsError, PortError, TapError
from fxdistill.models.tap import Section, Tap, Tower
from fxdistill.taps.table import TapTable, active, not_executed


def is_tap(node: fx.Node) -> bool:
    """Whether ``node`` is a tap marker."""
    return node.op == "call_function" and node.target is tap


@one_node
def begin(section: Section) -> None:
    """Mark that the operators after this call belong to ``section``."""
    if (table := active()) is not None:
        table.begin(section)


@one_node
def tap(x: Tensor, tower: Tower, path: str, port: str) -> Tensor:
    """Name ``x`` as a value of ``tower``, and return it.

    A module that two models share has the hooks of both: only taps of the running model count. The
    table keeps a copy, the value at this moment, because ``x`` may be written in place later.
    """
    table = active()
    if table is None or table.section != tower:
        return x
    if not table.capturing and _is_traced(x):
        raise table.fail(
            TapError(
                f"{tower} tap {path!r} lies inside a part that torch.compile compiles by itself. "
                "Do not compile the parts of the models that hold taps (compile=True compiles all "
                "as one graph), or tap outside of the compiled part."
            )
        )
    value = _behind(table, x)
    if (path, port) == ("", "logits"):
        _require_whole_vocabulary(table, tower, value)
    if tower not in table.expected.frozen and _inside_reentrant_checkpoint():
        raise table.fail(
            CheckpointError(
                f"{tower} tap {path!r} lies inside a checkpoint with use_reentrant=True, which "
                "runs its body without gradients: the tap would teach the student nothing. Use "
                "use_reentrant=False (Hugging Face: gradient_checkpointing_enable("
                'gradient_checkpointing_kwargs={"use_reentrant": False})).'
            )
        )
    table.add(path, port, value.clone())
    return x


def _behind(table: TapTable, x: Tensor) -> Tensor:
    """The DTensor whose local tensor ``x`` is, after a parallel style; else ``x`` itself."""
    reference, placed = table.behind.get(id(x), (None, None))
    return placed(x) if placed is not None and reference is not None and reference() is x else x


def _require_whole_vocabulary(table: TapTable, tower: Tower, logits: Tensor) -> None:
    """Raise LogitsError where plain logits are one rank's columns: they look like a vocabulary."""
    here, whole = table.expected.vocabularies.get(tower, (0, 0))
    if here != whole and logits.shape[-1] == here and not is_placed(logits):
        raise table.fail(
            LogitsError(
                f"the {tower}'s logits are a plain tensor {shown(logits.shape)}: the {here} "
                f"entries of this rank, of {whole}. Give its head "
                "ColwiseParallel(output_layouts=Shard(-1), use_local_output=False), so that they "
                "say where they belong."
            )
        )


def keep(x: Tensor, path: str, port: str) -> None:
    """Tap a value that is in no captured graph and cannot be copied."""
    if (table := active()) is not None:
        table.add(path, port, x)


@one_node
def tapped(tower: Tower, path: str, port: str, call: str) -> Tensor:
    """Return the value that ``tap`` named. ``call`` is text: dynamo makes numbers symbolic."""
    table = active()
    assert table is not None, "tapped() is only called while a table is recording"
    key = Tap(path, port, int(call))
    if (value := table.values.get((tower, key))) is not None:
        return value
    raise table.fail(not_executed(table, tower, key))


def check(fn: Callable[..., None]) -> Callable[..., None]:
    """Make ``fn`` a check: it sees shapes during the trace, and its node is removed afterwards.

    Its errors reach the user as they are, although dynamo wraps the exceptions of traced code.
    """

    @functools.wraps(fn)
    def checked(*args: Any) -> None:
        try:
            fn(*args)
        except FxDistillError as error:
            if (table := active()) is not None:
                table.fail(error)
            raise

    marker = one_node(checked)
    CHECKS.add(marker)
    return marker


LOCAL = "fxdistill_local"  # meta key of a captured node: a parallel style made its value local
CHECKS: set[Callable[..., None]] = set()


@check
def further_logits(tower: Tower, fields: str) -> None:
    """Note the ``fields`` of a model's output that look like further logits, for the report."""
    if (table := active()) is not None:
        table.further[tower] = fields


@check
def verified() -> None:
    """Check all tapped values before the objective reads them."""
    table = active()
    if table is not None and table.expected.verify is not None:
        table.expected.verify(table)


@check
def raw(*values: Tensor) -> None:
    """Record the inputs or outputs of a module before the hooks of a parallel style see them."""
    if (table := active()) is not None:
        table.raw = values


@check
def note_localised(*values: Tensor) -> None:
    """Record what those hooks return, so that a tap finds the DTensor of a local tensor."""
    if (table := active()) is None:
        return
    for before, after in zip(table.raw, values, strict=False):
        if is_placed(before) and not is_placed(after):
            # A weak reference, so that the model can free the value.
            table.behind[id(after)] = (weakref.ref(after), taps.placed_behind.behind(before, after))
    table.raw = ()


@one_node
def reject(tower: Tower, path: str, port: str, message: str) -> None:
    """Record that a port has no tensor; ``verified`` raises it with all other problems."""
    if (table := active()) is not None:
        table.problems[tower, path, port] = PortError(message)


@one_node
def named(x: Tensor, name: str) -> Tensor:
    """Name an output of the objective.

    Dynamo needs another tensor than ``x``. A step that runs eagerly returns ``x``: FSDP2 warns of
    an output that is a view, because writing to it in place would drop its hook.
    """
    return x.view_as(x) if _is_traced(x) else x


def _is_traced(x: Tensor) -> bool:
    """Whether ``x`` is a tracer's tensor without values."""
    return isinstance(x, (FakeTensor, FunctionalTensor))


def _inside_reentrant_checkpoint() -> bool:
    """Whether a ``torch.utils.checkpoint`` that runs its body under ``no_grad`` is on the stack."""
    if torch.is_grad_enabled():
        return False
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_filename.endswith("utils/checkpoint.py"):
            return True
        frame = frame.f_back
    return False
