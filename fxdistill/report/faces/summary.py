"""The compile-time summary: the terms, and what each pass did to the program."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn

from fxdistill.base.text import fitting
from fxdistill.graph.program import Program
from fxdistill.graph.sections import section_of
from fxdistill.losses.names import loss_name
from fxdistill.models.tap import Tower
from fxdistill.models.weights import weight_of
from fxdistill.objective.objective import Objective
from fxdistill.objective.term import LOGITS, LogitTerm, Term
from fxdistill.objective.weighed_by import weighed_by
from fxdistill.report.faces.terminal_tables import row, table


class Summary(Group):
    """What ``distiller.summary()`` returns: for ``rich.print``, and for ``print``."""

    def __str__(self) -> str:
        return fitting(self, self.renderables[:1])  # the terms


def summary(
    objective: Objective,
    projections: nn.ModuleList,
    program: Program | None,
    mode: str,
    notes: Iterable[str],
    axes: Mapping[str, int],
    unweighed: Collection[str] = (),
) -> "Summary":
    """Tables for 80 columns or more; without a program (eager, or no call yet) the terms alone.

    ``axes`` says how many axes the values of terms have, by the names of those that have run, and
    ``unweighed`` which of these no mask has weighed.
    """
    parts: list[Table | Text] = [_terms(objective, projections, axes, unweighed)]
    if program is None:
        eager = "all runs as it is, no graph is made"
        later = "no graph yet: one is captured at the first call"
        parts.append(Text(f"mode {mode}: {eager if mode == 'eager' else later}"))
    else:
        parts += [_passes(program), _sections(program)]
    return Summary(*parts, *(Text(f"note: {note}", overflow="fold") for note in notes))


def _terms(
    objective: Objective,
    projections: nn.ModuleList,
    axes: Mapping[str, int],
    unweighed: Collection[str],
) -> Table:
    layouts = [between(term, projections) for term in objective.features]
    columns = ("student", "teacher", "loss", "weighed by", *(["between"] if any(layouts) else []))
    made = table("Terms", *columns)

    def add(*cells: str) -> None:
        row(made, *cells[: len(columns)])

    for term, layout in zip(objective.features, layouts, strict=True):
        weighed = weighed_by(
            term,
            objective.task,
            ranks=objective.ranks,
            axes=axes.get(term.name),
            nothing=term.name in unweighed,
        )
        add(*_ends(term), loss_name(term.loss), weighed, layout)
    predictions = "samples" if objective.task == "classification" else "tokens"
    for of_logits in objective.logits:
        ours, theirs = of_model(of_logits.student, "logits"), _targets(of_logits, "logits")
        add(ours, theirs, loss_name(of_logits.loss), predictions, "")
    for label in objective.labels:
        ours = of_model(label.student, "logits")
        add(ours, "labels, where given", loss_name(label.loss), predictions, "")
    for head in objective.heads:
        ours = of_model(head.student, f"head {head.name}")
        if head.logits is not None:
            theirs = _targets(head.logits, "logits" if head.target == LOGITS else str(head.target))
            add(ours, theirs, loss_name(head.logits.loss), predictions, "")
        if head.labels is not None:
            add(ours, "labels, where given", loss_name(head.labels.loss), predictions, "")
    return made


def _targets(term: LogitTerm, value: str) -> str:
    """What a term on logits is compared with: the value of each teacher."""
    own = term.teachers == (term.student,)
    return f"its own {value}" if own else ", ".join(of_model(t, value) for t in term.teachers)


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
    made = table("Passes", "pass", "nodes", "result", "ms", right=("ms",))
    for record in program.history:
        result = f"{len(record.added)} values exposed" if record.added else ""
        result = "; ".join([result, *record.remarks] if result else record.remarks)
        if not record.changed and not result:
            result = "nothing to do"
        nodes = f"{record.nodes_before} -> {record.nodes_after}"
        row(made, record.name, nodes, result, f"{record.seconds * 1e3:.0f}")
    return made


def _sections(program: Program) -> Text:
    """The number of graph nodes in each section."""
    if program.title == "terms":
        nodes = len(program.gm.graph.nodes)
        return Text(f"The models run as they are; one graph of the terms: {nodes} nodes")
    counts = Counter(section_of(node) for node in program.gm.graph.nodes)
    parts = [f"{section} {count}" for section, count in counts.items() if section is not None]
    return Text(f"One graph: {', '.join(parts)} nodes; outputs: {len(program.outputs)}")
