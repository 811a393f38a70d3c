"""How a distiller runs: what ``wrap`` made of its options."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fxdistill.compiler.lower import Lowering
from fxdistill.graph.program import Pass

Mode = Literal["one_graph", "regional", "eager"]


@dataclass(frozen=True)
class Plan:
    """The options of one distiller."""

    mode: Mode = "one_graph"
    lowering: Lowering = Lowering()
    dynamic: bool | None = None
    fallback: bool = False
    passes: tuple[Pass, ...] = ()
    fuse_head: bool = True
    freeze_teacher: bool = True
    outputs: tuple[str, ...] = ()
    shardings: Mapping[str, Any] = field(default_factory=dict)  # by tower, with ``mesh=``
    notes: tuple[str, ...] = ()
