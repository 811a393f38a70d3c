"""Make a report: capture a step without running it, and read what it costs."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

import fxdistill
from fxdistill.base.attention import Attention
from fxdistill.base.tensors import is_placed
from fxdistill.compiler.backend import Recipe
from fxdistill.compiler.lower import Lowering
from fxdistill.errors import CaptureError, FxDistillError, StepError
from fxdistill.graph.halves import Halves
from fxdistill.graph.sections import Paths, section_of
from fxdistill.losses.attention import map_shape
from fxdistill.losses.names import loss_name
from fxdistill.models.conventions import Task
from fxdistill.models.landmarks import head_path, roles_in
from fxdistill.objective.call import Call
from fxdistill.objective.objective import Objective
from fxdistill.objective.term import PAIRS
from fxdistill.objective.weighed_by import as_compared, weighed_by
from fxdistill.report.data import (
    SCHEMA,
    BlockLine,
    Event,
    Memory,
    Pair,
    Plain,
    TermLine,
    TowerFacts,
    Value,
)
from fxdistill.report.faces.summary import between, projection_of
from fxdistill.report.fit import of_losses
from fxdistill.report.read import costs, gradients_and_writes, memory
from fxdistill.report.read.changes import depends_on_values, pass_lines
from fxdistill.report.read.fakes import faked, standing_in
from fxdistill.report.read.inputs import tensors_of
from fxdistill.report.read.owners import Heads
from fxdistill.report.read.towers import blocks_of, bytes_here, dtype_name, towers_of
from fxdistill.report.read.warnings import warnings_of
from fxdistill.report.report import Report
from fxdistill.report.subject import Subject
from fxdistill.taps.attention import value_of as value_at
from fxdistill.taps.table import TapTable


def build(subject: Subject, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Report:
    """The report of a step with these arguments; without arguments, with those of the last call.

    Raises StepError if there are no arguments and there was no call.
    """
    given = bool(args or kwargs)
    inputs = (args, dict(kwargs)) if given else subject.journal.last
    if inputs is None:
        raise StepError(
            "a report needs to know what a step is called with, and nothing was called yet: "
            "distiller.report(input_ids=ids, labels=ids), as the distiller itself would be called"
        )
    towers = towers_of(subject)  # before fake tensors replace the models' own: real devices
    models = subject.parts.values()
    with torch.inference_mode(False), torch.enable_grad(), standing_in(models) as mode:
        if mode is not None:
            inputs = faked(inputs, mode)
        return _report(subject, towers, *inputs, given=given)


def _report(
    subject: Subject,
    towers: tuple[TowerFacts, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    given: bool,
) -> Report:
    call, subject = subject.sort(args, kwargs)
    known = _known(subject, towers, call, given)
    try:
        program, halves, table = subject.capture(call, _objective(subject, call), _recipe(subject))
    except FxDistillError as error:
        return dataclasses.replace(known, stopped=_stopped(subject, error))
    found = dataclasses.replace(
        known,
        pairs=tuple(_pairs(subject, table, call)),
        passes=pass_lines(program.history),
        nodes=dict(Counter(section_of(n) or "inputs" for n in program.gm.graph.nodes)),
        warnings=tuple(dict.fromkeys((*known.warnings, *table.warnings))),
        notes=(*known.notes, *_further_logits(subject, table)),
    )
    if halves is None:
        return found
    try:
        return _with_costs(found, subject, call, halves)
    except GuardOnDataDependentSymNode:
        return dataclasses.replace(
            found,
            stopped="sizes in the step depend on values: what it costs is not known before it runs"
            + depends_on_values(halves.forward.graph),
        )


def _further_logits(subject: Subject, table: TapTable) -> Iterator[str]:
    """Notes on logits that a model which learns returns and no head trains."""
    objective = subject.objective
    for tower, ports in table.further.items():
        heads = [h for h in objective.heads if (h.student, h.tap.path) == (tower, "")]
        read = {head.tap.port.removeprefix("output.") for head in heads}
        inside = tuple(port + sign for port in read for sign in "[.")  # of one entry: its list
        all_ports = ports.split(", ")
        unread = [port for port in all_ports if port not in read and not port.startswith(inside)]
        if not unread or tower in subject.frozen or tower in subject.teachers:
            continue
        found = f"the {tower} also returns {', '.join(unread)}, which no head trains: "
        if tower != "student":  # of several students, which have no heads
            yield f"{found}students that teach each other learn from their own logits alone"
            continue
        named = ", ".join(_suggested(port, objective.task) for port in unread)
        yield f"{found}wrap(..., heads={{{named}}})"


def _suggested(port: str, task: Task | None) -> str:
    """A head for logits at ``port``: the k-th of a causal model's look k + 2 tokens ahead."""
    place = re.search(r"\[(\d+)\]$", port)
    ahead = f", shift={int(place[1]) + 2}" if place and task == "causal_lm" else ""
    name = re.sub(r"\W+", "_", port).strip("_")
    return f'"{name}": fxdistill.Head(":{port}"{ahead})'


def _objective(subject: Subject, call: Call) -> Objective:
    """The objective of this call: without labels there are no label terms."""
    objective = subject.objective
    return objective if call.batch.labels is not None else objective.without_labels()


def _stopped(subject: Subject, error: FxDistillError) -> str:
    text = f"{type(error).__name__}: {error}"
    if subject.mode == "one_graph" or not isinstance(error, CaptureError):
        return text
    # The distiller already runs in the mode that the error recommends.
    said = text.partition("\nWhat to do")[0]
    return f"{said}\nThe step itself runs: mode {subject.mode!r} needs no graph of the models."


def _recipe(subject: Subject) -> Recipe:
    """The recipe of the step; in eager mode the heads are not fused."""
    recipe = subject.recipe
    fuse = recipe.wanted.fuse_head and subject.mode != "eager"
    wanted = dataclasses.replace(recipe.wanted, fuse_head=fuse)
    return dataclasses.replace(recipe, lowering=_lowering(subject), wanted=wanted)


def _lowering(subject: Subject) -> Lowering:
    """The step's lowering, or "aot_eager" where it is unknown what that lowering allocates."""
    lowering = subject.recipe.lowering
    known = subject.mode == "one_graph" and lowering.backend in ("inductor", "aot_eager")
    return lowering if known else Lowering("aot_eager")


# ---------------------------------------------------------------------- what needs no capture


def _known(subject: Subject, towers: tuple[TowerFacts, ...], call: Call, given: bool) -> Report:
    backend = "" if subject.mode == "eager" else subject.recipe.lowering.backend
    pairs = tuple(_pairs(subject, None, call))
    terms = tuple(_terms(subject, _objective(subject, call)))
    return Report(
        schema=SCHEMA,
        fxdistill=fxdistill.__version__,
        torch=torch.__version__,
        mode=subject.mode,
        backend=backend if isinstance(backend, str) else _name(backend),
        mesh=_mesh(subject),
        inputs={name: value_of(tensor) for name, tensor in tensors_of(call, subject.main).items()},
        towers=towers,
        pairs=pairs,
        terms=terms,
        events=tuple(Event(*event) for event in subject.journal.events),
        # The last call is remembered without its values, so they cannot be checked.
        warnings=(
            *warnings_of(subject, call if given else None),
            *_odd_weights((*terms, *pairs)),
        ),
        notes=subject.notes,
    )


def _mesh(subject: Subject) -> dict[str, int]:
    """The mesh of the parameters: ranks by dimension; empty without a mesh."""
    parameters = (p for model in subject.models.values() for p in model.parameters())
    placed: Any = next((p for p in parameters if is_placed(p)), None)
    if placed is None:
        return {}
    mesh = placed.device_mesh
    names = mesh.mesh_dim_names or tuple(map(str, range(mesh.ndim)))
    return dict(zip(names, mesh.shape, strict=True))


def _name(value: Any) -> str:
    return str(getattr(value, "__name__", type(value).__name__))


def _of_mode(subject: Subject) -> Iterator[str]:
    mode, backend = subject.mode, subject.recipe.lowering.backend
    if mode != "one_graph":
        yield (
            f"costs are those of one graph whose operators run one by one; this distiller runs "
            f"{mode}, where the models keep what autograd keeps"
        )
    elif backend not in ("inductor", "aot_eager"):
        yield "costs are those of operators that run one by one: what the backend does is unknown"


def value_of(tensor: Tensor) -> Value:
    """The shape, dtype and placements of ``tensor``."""
    placed = tuple(map(str, tensor.placements)) if is_placed(tensor) else ()
    return Value(tuple(int(size) for size in tensor.shape), dtype_name(tensor), placed)


def _value_of(tensor: Tensor | None) -> Value | None:
    """``value_of``; ``None`` for no tensor, or one whose sizes depend on values."""
    try:
        return None if tensor is None else value_of(tensor)
    except GuardOnDataDependentSymNode:
        return None


def _as_map(x: Any) -> Any:
    """A tensor like the map that nobody forms; any other value as it is."""
    if not isinstance(x, Attention):
        return x
    return torch.empty(map_shape(x), dtype=x.query.dtype, device="meta")


def _pairs(subject: Subject, table: TapTable | None, call: Call) -> Iterator[Pair]:
    roles = {tower: roles_in(model) for tower, model in subject.models.items()}
    task, ranks = subject.objective.task, subject.objective.ranks
    for term in subject.objective.features:
        found = [None if table is None else value_at(table, *end) for end in term.taps]
        student, teacher = map(_as_map, found)
        seen = as_compared(term, *found)
        ours, theirs = (roles[tower].get(tap.path, ("",))[0] for tower, tap in term.taps)
        yield Pair(
            term.name,
            str(term.student),
            str(term.teacher),
            loss_name(term.loss),
            _number(subject.settings[PAIRS if term.in_pairs else term.name]),
            between(term, subject.projections),
            _value_of(student),
            _value_of(teacher),
            ours,
            theirs,
            projection_of(term, subject.projections),
            *term.of,
            weighed_by(term, task, call.batch, seen, ranks),
        )


def _terms(subject: Subject, objective: Objective) -> Iterator[TermLine]:
    settings = subject.settings
    for name, loss, setting, share in (
        *((t.name, t.loss, "logit_weight", t.share) for t in objective.logits),
        *((t.name, t.loss, "label_weight", t.share) for t in objective.labels),
    ):
        yield TermLine(name, loss_name(loss), share * _number(settings[setting]))
    labelled = bool(objective.labels)
    for head in objective.heads:
        for term in head.terms if labelled else (head.logits,) if head.logits else ():
            setting = "logit_weight" if term is head.logits else "label_weight"
            weight = _number(settings[setting]) * _number(settings[term.name])
            yield TermLine(term.name, loss_name(term.loss), weight)
    if objective.features:
        names = sorted({loss_name(term.loss) for term in objective.features})
        yield TermLine("features", ", ".join(names), _number(settings["feature_weight"]))


def _odd_weights(weighted: Iterable[Pair | TermLine]) -> Iterator[str]:
    for one in weighted:
        if not math.isfinite(one.weight):
            yield f"the weight of {one.name} is {one.weight}, and so will the total be"


def _number(value: float | Tensor) -> float:
    with unset_fake_temporarily():  # settings are real numbers, even under a fake tensor mode
        return float(value)


# ---------------------------------------------------------------------- what a capture tells


def _with_costs(report: Report, subject: Subject, call: Call, halves: Halves) -> Report:
    towers = tuple(_with_blocks(subject, tower, halves) for tower in report.towers)
    paths = {tower.name: [block.path for block in tower.blocks] for tower in towers}
    needed = _memory(subject, halves, paths)
    told = of_losses(needed)
    return dataclasses.replace(
        report,
        towers=towers,
        flops=costs.flops(halves, subject.teachers),
        memory=needed,
        plain=_plain(subject, call, paths),
        collectives=costs.traffic(halves, subject.main),
        casts=costs.casts(halves, call.casts),
        warnings=(
            *report.warnings,
            *gradients_and_writes.warnings_of(subject, call, halves),
        ),
        notes=(
            *report.notes,
            *_of_mode(subject),
            *gradients_and_writes.notes_of(subject, halves),
            *costs.notes_of(halves),
            *([told] if told else []),
        ),
    )


def _with_blocks(subject: Subject, tower: TowerFacts, halves: Halves) -> TowerFacts:
    """``tower`` with the FLOPs of its blocks; blocks without parameters and FLOPs are left out."""
    blocks = list(blocks_of(subject.parts[tower.name]))
    found = costs.by_block(halves, {tower.name: [block.path for block in blocks]})

    def counted(block: BlockLine) -> BlockLine:
        forward, backward = (
            found.get((tower.name, block.path, half), 0) for half in ("forward", "backward")
        )
        return dataclasses.replace(block, forward=forward, backward=backward)

    parts = [part for part in map(counted, blocks) if part.parameters or part.forward]
    return dataclasses.replace(tower, blocks=tuple(parts))


def _memory(subject: Subject, halves: Halves, paths: Paths) -> Memory:
    weights = _weights(subject)
    gradients = bytes_here(gradients_and_writes.learning(subject, halves).values())
    # torch's optimizers keep their states in the dtype of the parameter.
    states = {"SGD": 0, "SGD with momentum": gradients, "Adam, AdamW": 2 * gradients}
    return memory.memory(halves, weights, gradients, states, _heads(subject), paths)


def _weights(subject: Subject) -> dict[str, int]:
    """Bytes of parameters and buffers on this rank; shared ones count for the main model."""
    seen: set[int] = set()
    found = {}
    for name, module in subject.parts.items():
        own = [t for t in (*module.parameters(), *module.buffers()) if id(t) not in seen]
        seen.update(map(id, own))
        found[name] = bytes_here(own)
    return found


def _heads(subject: Subject) -> Heads:
    """The path of each model's head, and the width of its logits."""
    found = {}
    for tower, model in subject.models.items():
        if (path := head_path(model)) is not None:
            head = cast(nn.Linear, model.get_submodule(path))
            found[tower] = path, head.out_features
    return found


def _plain(subject: Subject, call: Call, paths: Paths) -> Plain | None:
    """The costs of the student alone on the same labels; ``None`` without label terms."""
    objective = _objective(subject, call)
    labels = tuple(term for term in objective.labels if term.student == subject.main)
    if not labels:
        return None
    alone = dataclasses.replace(objective, features=(), logits=(), labels=labels, heads=())
    recipe = _recipe(subject)
    wanted = dataclasses.replace(recipe.wanted, user=(), fuse_head=False)
    _, halves, _ = subject.capture(call, alone, dataclasses.replace(recipe, wanted=wanted))
    if halves is None:  # the label loss reaches no trainable parameter: only matches do
        return None
    weights = {subject.main: _weights(subject)[subject.main]}
    gradients = bytes_here(gradients_and_writes.learning(subject, halves).values())
    found = memory.memory(halves, weights, gradients, {}, _heads(subject), paths)
    total = costs.flops(halves, subject.teachers).total
    return Plain(total, found.peak, gradients, found.saved, found.head, found.transient)
