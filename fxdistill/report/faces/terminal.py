"""A report in a terminal of 80 columns or more: first the main costs, then the details."""

from collections.abc import Iterable
from dataclasses import replace

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fxdistill.base.figures import amount, operations, ratio, size
from fxdistill.report.data import Facts, Pair, PassLine, Value
from fxdistill.report.faces.folding import Fold, folds, gathered, mesh_of, models_of
from fxdistill.report.faces.summary import of_model
from fxdistill.report.faces.terminal_costs import costs
from fxdistill.report.faces.terminal_sketch import sketch
from fxdistill.report.faces.terminal_tables import Cell, Part, row, table


def terminal(report: Facts) -> Group:
    """The whole report, for ``rich.print`` or a console at least 80 columns wide."""
    parts: list[Part] = [*_head(report), _models(report), *_inputs(report)]
    parts += [*sketch(report), *pairs(report), *_terms(report)]
    parts += [*costs(report), *_passes(report), *_graph(report)]
    apart = [piece for part in parts for piece in (part, Text())]
    return Group(*apart, *_told(report))


# ---- the main facts


def _head(report: Facts) -> list[Part]:
    head = Text(" ← ".join(models_of(report)), style="bold", overflow="fold")
    versions = f"fxdistill {report.fxdistill}, torch {report.torch}"
    made = f"{report.mode}, {report.backend}" if report.backend else report.mode
    if report.mesh:
        made += f"; one rank of {mesh_of(report)}"
    head.append(f"\n{versions}; {made}", style="not bold dim")
    facts = Text("\n".join(_facts(report)), overflow="fold")
    if report.stopped is None:
        return [head, facts]
    lead = Text("stopped: ", style="bold red", overflow="fold")
    return [lead.append(report.stopped, style="not bold"), head, facts]


def _facts(report: Facts) -> Iterable[str]:
    plain = report.plain
    if report.memory is not None:
        beside = f", {ratio(report.memory.peak, plain.peak)} plain training" if plain else ""
        yield f"peak memory {size(report.memory.peak)}{beside}, before optimizer states"
    if report.flops is not None:
        beside = f", {ratio(report.flops.total, plain.flops)} plain training" if plain else ""
        yield f"{operations(report.flops.total)} a step{beside}"
    yield f"{_plural(len(report.pairs), 'pair')}, {_plural(len(report.warnings), 'warning')}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


# ---- the parts of a step


def _models(report: Facts) -> Table:
    columns = ("", "model", "params", "trained", "bytes", "dtypes")
    made = table("Models", *columns, right=("params", "trained", "bytes"))
    for tower in report.towers:
        dtypes = ", ".join(_short(dtype) for dtype in tower.dtypes)
        trained = amount(tower.trainable) if tower.trainable else "frozen"
        numbers = amount(tower.parameters), trained, size(tower.bytes)
        mode = "" if tower.training else ", eval"
        row(made, tower.name, tower.model, *numbers, f"{dtypes}{mode}")
    return made


def _short(dtype: str) -> str:
    return dtype.removeprefix("torch.")


def _value(value: Value) -> str:
    return str(replace(value, dtype=_short(value.dtype)))


def _inputs(report: Facts) -> list[Part]:
    if not report.inputs:
        return []
    made = table("Inputs", "name", "value")
    for name, value in report.inputs.items():
        row(made, name, _value(value))
    return [made]


def pairs(report: Facts) -> list[Part]:
    """The table of the pairs; equal ones of several layers are one row."""
    if not report.pairs:
        return [Text("No pairs: nothing is matched but logits and labels", style="dim")]
    made = table("Pairs", "student ← teacher", "loss", "×", right=("×",))
    told: set[object] = set()
    for fold in folds(report.pairs):
        pair = report.pairs[fold.members[0]]
        weight = "" if pair.weight == 1 else f"{pair.weight:g} · "
        ours = of_model(pair.student_model, fold.student)
        what = Text(f"{ours}\n← {of_model(pair.teacher_model, fold.teacher)}")
        for line in _details(pair, fold, again=fold.numbers in told):
            what.append(f"\n  {line}", style="dim")
        told.add(fold.numbers)
        row(made, what, f"{weight}{pair.loss}", str(len(fold.members)))
    return [made]


def _details(pair: Pair, fold: Fold, *, again: bool) -> Iterable[str]:
    if pair.student_value is not None and pair.teacher_value is not None:
        ours, theirs = _value(pair.student_value), _value(pair.teacher_value)
        yield ours if ours == theirs else f"{ours} ← {theirs}"
    if pair.between:
        yield pair.between
    if pair.weighed_by not in ("", "tokens"):
        yield f"weighed by {pair.weighed_by}"
    if any(ours != theirs for ours, theirs in fold.numbers):
        layers = " ".join(f"{ours}←{theirs}" for ours, theirs in fold.numbers)
        yield "the same layers as above" if again else layers


def _terms(report: Facts) -> list[Part]:
    if not report.terms:
        return []
    made = table("Terms of the total", "term", "loss", "weight", right=("weight",))
    for term in report.terms:
        row(made, term.name, term.loss, f"{term.weight:g}")
    return [made]


def _passes(report: Facts) -> list[Part]:
    if not report.passes:
        return []
    numbers = ("nodes", "FLOP", "bytes")
    made = table("Passes", "pass", *numbers, "ms", right=(*numbers, "ms"))
    for line in report.passes:
        row(made, *_pass(line), f"{line.seconds * 1e3:.0f}")
    return [made]


def _pass(line: PassLine) -> Iterable[Cell]:
    """The cells of a pass: name over remarks; a number that changed is shown before and after."""
    exposed = (
        _plural(len(line.exposed), "output") + " exposed: " + ", ".join(gathered(line.exposed))
    )
    said = [*([exposed] if line.exposed else []), *line.remarks]
    if not line.changed and not said:
        said = ["nothing to do"]
    yield Text.assemble(
        line.name, (f"  {line.graph}", "dim"), *((f"\n  {text}", "dim") for text in said)
    )
    for change, show in ((line.nodes, str), (line.flops, operations), (line.bytes, size)):
        if change is None:
            yield ""
        elif change.before == change.after:
            yield show(change.after)
        else:
            yield f"{show(change.before)}\n→ {show(change.after)}"


def _graph(report: Facts) -> list[Part]:
    parts: list[Part] = []
    if report.nodes:
        counts = ", ".join(f"{section} {count}" for section, count in report.nodes.items())
        parts.append(Text(f"One graph, nodes: {counts}", overflow="fold"))
    if report.collectives:
        made = table("Collectives", "of", "kind", "times", "bytes", right=("times", "bytes"))
        for one in report.collectives:
            row(made, one.owner, one.kind, str(one.times), size(one.bytes))
        parts.append(made)
    if report.casts:
        made = table("Casts", "in", "from", "to", "times", right=("times",))
        for cast in report.casts:
            row(made, cast.owner, _short(cast.before), _short(cast.after), str(cast.times))
        parts.append(made)
    return parts


def _told(report: Facts) -> list[Part]:
    """The events, warnings and notes, a line for each."""
    lines = [(f"{event.kind}: ", "bold", event.reason) for event in report.events]
    lines += [("warning: ", "bold yellow", warning) for warning in report.warnings]
    lines += [("note: ", "dim", note) for note in report.notes]
    return [
        Text(overflow="fold").append(lead, style=style).append(text) for lead, style, text in lines
    ]
