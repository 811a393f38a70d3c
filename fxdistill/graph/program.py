"""Programs: a graph, the names of its outputs, and the passes that it went through.

Private to torch and used here only: ``_LazyGraphModule``. If it moves, code is written sooner.
"""

import copy
import difflib
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

from torch import fx
from torch.fx import _lazy_graph_module

from fxdistill.errors import OptionError, did_you_mean

Level = Literal["captured", "joint"]


@dataclass(frozen=True)
class PassRecord:
    """What one pass did to a program."""

    name: str
    nodes_before: int
    nodes_after: int
    added: tuple[str, ...]
    seconds: float
    changed: bool
    remarks: tuple[str, ...] = ()
    level: Level = "captured"
    graph: str = ""  # the title of the program
    # The graph as the pass found it, and as it left it: for costs and differences.
    before: fx.GraphModule | None = field(default=None, compare=False, repr=False)
    after: fx.GraphModule | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        """One log line."""
        what = f"{self.nodes_before} -> {self.nodes_after} nodes" if self.changed else "unchanged"
        added = f", outputs + {len(self.added)}" if self.added else ""
        said = f"; {'; '.join(self.remarks)}" if self.remarks else ""
        return f"{self.name}: {what}{added}{said} ({self.seconds * 1e3:.0f} ms)"

    def diff(self, context: int = 3) -> str:
        """The graph before and after, as a unified diff; empty where nothing changed."""
        before, after = (
            "" if gm is None else gm.print_readable(print_output=False, include_stride=False)
            for gm in (self.before, self.after)
        )
        names = f"before {self.name}", f"after {self.name}"
        lines = difflib.unified_diff(
            before.splitlines(), after.splitlines(), *names, n=context, lineterm=""
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class Program:
    """A graph whose outputs have names.

    ``level`` is ``"captured"`` for torch operators as the models call them (modules' operators and
    losses still readable, values may be mutated), and ``"joint"`` for AOTAutograd's functional
    forward and backward. ``remarks`` are what passes tell the reader of the report: what they
    chose, or why they declined.
    """

    gm: fx.GraphModule
    outputs: tuple[str, ...]
    history: tuple[PassRecord, ...] = ()
    level: Level = "captured"
    remarks: tuple[str, ...] = field(default=(), compare=False)
    title: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        """Check that there are as many names as outputs."""
        values = output_values(self.gm.graph)
        assert len(values) == len(self.outputs), f"{len(values)} outputs, names {self.outputs}"

    def fork(self) -> "Program":
        """Copy the graph; share the weights."""
        return replace(self, gm=fork_module(self.gm))

    @property
    def code(self) -> str:
        """The graph as Python, one operator per line."""
        text: str = self.gm.print_readable(print_output=False, include_stride=False)
        return f"# {self.title or self.level} -> {', '.join(self.outputs)}\n{text}"

    def __str__(self) -> str:
        """The program as text."""
        return self.code

    def diff(self, name: str, context: int = 3) -> str:
        """What the pass ``name`` did, as a unified diff of the code before and after.

        If the pass ran several times, all its diffs follow one another.

        Raises:
            OptionError: No pass of this name has run.
        """
        records = [record for record in self.history if record.name == name]
        if not records:
            known = list(dict.fromkeys(record.name for record in self.history))
            raise OptionError(f"no pass {name!r} has run. Nearest: {did_you_mean(name, known)}.")
        return "\n".join(record.diff(context) for record in records)


P = TypeVar("P", bound=Program)


class Pass(Protocol):
    """A frozen value that maps a Program to a Program, to itself if there is nothing to do."""

    def __call__(self, program: P, /) -> P:
        """Return the changed copy, or ``program`` itself."""
        ...


def output_values(graph: fx.Graph) -> tuple[fx.node.Argument, ...]:
    """The values that a graph with flat outputs returns."""
    (values,) = graph.output_node().args
    return tuple(values) if isinstance(values, (tuple, list)) else (values,)


def all_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes of ``gm`` and of the regions inside it (checkpoint bodies, branches, loops)."""
    return [n for m in gm.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes]


def graph_module(root: Any, graph: fx.Graph, name: str) -> fx.GraphModule:
    """A module for a graph, whose Python is written when it is first called or read.

    Passes make many of them that nobody calls.
    """
    kind = getattr(_lazy_graph_module, "_LazyGraphModule", fx.GraphModule)
    made: fx.GraphModule = kind(root, graph, name)
    return made


def fork_module(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy the graph of ``gm`` and of the regions inside it (checkpoint bodies); share the rest."""
    graph = copy_graph(gm.graph)
    fork = graph_module(gm, graph, gm.__class__.__name__)
    fork.meta.update(gm.meta)
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(fork, name, fork_module(child))
    return fork


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Copy nodes with shallow metadata: fake tensors in ``meta`` keep their identity."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    value = new.graph_copy(graph, env)
    out = new.output(value)
    old = graph.output_node()
    out.meta = copy.copy(old.meta)
    for source, node in env.items():
        node.meta = copy.copy(source.meta)
    new.set_codegen(copy.copy(graph._codegen))
    return new
