"""The compile-time summary: the terms, and what each pass did to the program."""

from collections import Counter
from collections.abc import Iterable

from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn

from fxdistill.base.text import text
from fxdistill.graph.program import Program
from fxdistill.graph.sections import section_of
from fxdistill.losses.names import loss_name
from fxdistill.models.tap import Tower
from fxdistill.models.weights import weight_of
from fxdistill.objective.feature_terms import weighed_by
from fxdistill.objective.objective import Objective
from fxdistill.objective.term import Term


class Summary(Group):
    """What ``distiller.summary()`` returns: for ``rich.print``, and for ``print``."""

    def __str__(self) -> str:
        return text(self, 80)


def summary(
    objective: Objective,
    projections: nn.ModuleList,
    program: Program | None,
    mode: str,
    notes: Iterable[str],
) -> "Summary":
    """Tables for 80 columns; without a program (eager mode, or no call yet), only the terms."""
    parts: list[Table | Text] = [_terms(objective, projections)]
    if program is None:
        eager = "all runs as it is, no graph is made"
        later = "no graph yet: one is captured at the first call"
        parts.append(Text(f"mode {mode}: {eager if mode == 'eager' else later}"))
    else:
        parts += [_passes(program), _sections(program)]
    return Summary(*parts, *(Text(f"note: {note}", overflow="fold") for note in notes))


def _terms(objective: Objective, projections: nn.ModuleList) -> Table:
    table = Table(title="Terms", title_justify="left")
    for column in ("student", "teacher", "loss", "weighed by"):
        table.add_column(column, overflow="fold")
    if any(between(term, projections) for term in objective.features):
        table.add_column("between", overflow="fold")
    for term in objective.features:
        cells = [*_ends(term), loss_name(term.loss), weighed_by(term, objective.task)]
        table.add_row(*cells, *([between(term, projections)] if len(table.columns) > 4 else []))
    for of_logits in objective.logits:
        ours, theirs = of_model(of_logits.student, "logits"), of_model(of_logits.teacher, "logits")
        table.add_row(ours, theirs, loss_name(of_logits.loss), "predictions")
    for label in objective.labels:
        ours = of_model(label.student, "logits")
        table.add_row(ours, "labels, where given", loss_name(label.loss), "predictions")
    return table


def _ends(term: Term) -> list[str]:
    return [of_model(tower, str(tap)) for tower, tap in term.taps]


def of_model(tower: Tower, value: str) -> str:
    """A value as tables show it, with its model unless that is "student" or "teacher"."""
    return value if tower in ("student", "teacher") else f"{tower}/{value}"


def between(term: Term, projections: nn.ModuleList) -> str:
    """The layout and the projection of the student's value, then the teacher's layout."""
    ours, theirs = (
        "; ".join(f"{pattern} {reduction}".strip() for pattern, reduction in layout)
        for layout in term.layouts
    )
    parts = [part for part in (ours, projection_of(term, projections)) if part]
    return ", ".join(parts) + (f" | {theirs}" if theirs else "")


def projection_of(term: Term, projections: nn.ModuleList) -> str:
    """The class and widths of the student's projection; empty if there is none."""
    if term.projection is None:
        return ""
    module = projections[term.projection]
    weight = weight_of(module, "")
    widths = f" {weight.fan_in} → {weight.fan_out}" if weight is not None else ""
    return f"{type(module).__name__}{widths}"


def _passes(program: Program) -> Table:
    table = Table("pass", "nodes", "result", "ms", title="Passes", title_justify="left")
    for record in program.history:
        result = f"{len(record.added)} values exposed" if record.added else ""
        result = "; ".join([result, *record.remarks] if result else record.remarks)
        if not record.changed and not result:
            result = "nothing to do"
        nodes = f"{record.nodes_before} -> {record.nodes_after}"
        table.add_row(record.name, nodes, result, f"{record.seconds * 1e3:.0f}")
    return table


def _sections(program: Program) -> Text:
    """The number of graph nodes in each section."""
    if program.title == "terms":
        nodes = len(program.gm.graph.nodes)
        return Text(f"The models run as they are; one graph of the terms: {nodes} nodes")
    counts = Counter(section_of(node) for node in program.gm.graph.nodes)
    parts = [f"{section} {count}" for section, count in counts.items() if section is not None]
    return Text(f"One graph: {', '.join(parts)} nodes; outputs: {len(program.outputs)}")
