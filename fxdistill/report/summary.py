"""The compile-time summary: pairs, and what each pass did to the program."""

from collections import Counter

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fxdistill.compose import section_of
from fxdistill.objective import Objective
from fxdistill.program import Program


def summary(objective: Objective, program: Program | None, mode: str) -> Group:
    """Tables for 80 columns. Without a program (eager, or not called yet): only the pairs."""
    parts: list[Table | Text] = [_terms(objective)]
    if program is None:
        parts.append(Text(f"no graph yet (mode {mode}): one graph is captured at the first call"))
    else:
        parts += [_passes(program), _sections(program)]
    return Group(*parts)


def _terms(objective: Objective) -> Table:
    table = Table("student", "teacher", "loss", title="Terms", title_justify="left")
    for term in objective.features:
        table.add_row(str(term.student), str(term.teacher), _name(term.loss))
    if objective.logit_loss is not None:
        table.add_row("logits", "logits", _name(objective.logit_loss))
    if objective.label_loss is not None:
        table.add_row("logits", "labels, where given", _name(objective.label_loss))
    return table


def _name(loss: object) -> str:
    """The name of a function, also inside ``functools.partial``."""
    return getattr(getattr(loss, "func", loss), "__name__", type(loss).__name__)


def _passes(program: Program) -> Table:
    table = Table("pass", "nodes", "result", "ms", title="Passes", title_justify="left")
    for record in program.history:
        result = f"{len(record.added)} values exposed" if record.added else ""
        if not record.changed:
            result = "nothing to do"
        nodes = f"{record.nodes_before} -> {record.nodes_after}"
        table.add_row(record.name, nodes, result, f"{record.seconds * 1e3:.0f}")
    return table


def _sections(program: Program) -> Text:
    """How many nodes of the one graph come from where."""
    counts = Counter(section_of(node) for node in program.gm.graph.nodes)
    parts = [f"{section} {counts[section]}" for section in ("teacher", "student", "objective")]
    return Text(f"One graph: {', '.join(parts)} nodes; outputs: {len(program.outputs)}")
