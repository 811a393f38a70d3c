"""Make a report: capture a step without running it, and read what it costs."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

import fxdistill
from fxdistill.base.tensors import is_placed
from fxdistill.compiler.backend import Recipe
from fxdistill.compiler.lower import Lowering
from fxdistill.errors import CaptureError, FxDistillError, StepError
from fxdistill.graph.halves import Halves
from fxdistill.graph.sections import Paths, section_of
from fxdistill.losses.names import loss_name
from fxdistill.models.landmarks import head_path, roles_in
from fxdistill.objective.call import Call
from fxdistill.report.data import (
    SCHEMA,
    Block,
    Event,
    Memory,
    Pair,
    Plain,
    Term,
    Tower,
    Value,
)
from fxdistill.report.faces.summary import between, projection_of
from fxdistill.report.read import gradients_and_writes, memory
from fxdistill.report.read.changes import depends_on_values, pass_lines
from fxdistill.report.read.costs import by_block, casts, flops, notes_of, traffic
from fxdistill.report.read.fakes import faked, standing_in
from fxdistill.report.read.inputs import tensors_of
from fxdistill.report.read.towers import blocks_of, bytes_here, dtype_name, towers_of
from fxdistill.report.read.warnings import warnings_of
from fxdistill.report.report import Report
from fxdistill.taps.table import TapTable

if TYPE_CHECKING:
    from fxdistill.distiller.distiller import Distiller


def build(distiller: "Distiller", args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Report:
    """The report of a step on these inputs; without any, on those of the last call."""
    given = bool(args or kwargs)
    inputs = (args, dict(kwargs)) if given else distiller.past.last
    if inputs is None:
        raise StepError(
            "a report needs to know what a step is called with, and nothing was called yet: "
            "distiller.report(input_ids=ids, labels=ids), as the distiller itself would be called"
        )
    models = (distiller.student, distiller.teacher, distiller.projections)
    distiller._settle_modes()
    towers = towers_of(*models, frozen=distiller.plan.freeze_teacher)  # where they really lie
    with torch.inference_mode(False), torch.enable_grad(), standing_in(models) as mode:
        # The vector of weights may be fake then, and must not be kept.
        vector, distiller._vector = distiller._vector, None
        try:
            if mode is not None:
                inputs = faked(inputs, mode)
            return _report(distiller, towers, *inputs, given=given)
        finally:
            distiller._vector = vector


def _report(
    distiller: "Distiller",
    towers: tuple[Tower, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    given: bool,
) -> Report:
    call = distiller._sort(args, kwargs)
    distiller._guard(call)
    objective = distiller._objective_of(call)
    known = _known(distiller, towers, call, given)
    try:
        program, halves, table = distiller.dry(call, objective, _recipe(distiller), cut=True)
    except FxDistillError as error:
        return dataclasses.replace(known, stopped=_stopped(distiller, error))
    found = dataclasses.replace(
        known,
        pairs=tuple(_pairs(distiller, table)),
        passes=pass_lines(program.history),
        nodes=dict(Counter(section_of(n) or "inputs" for n in program.gm.graph.nodes)),
        warnings=tuple(dict.fromkeys((*known.warnings, *table.warnings))),
    )
    if halves is None:
        return found
    try:
        return _with_costs(found, distiller, call, halves)
    except GuardOnDataDependentSymNode:
        return dataclasses.replace(
            found,
            stopped="sizes in the step depend on values: what it costs is not known before it runs"
            + depends_on_values(halves.forward.graph),
        )


def _stopped(distiller: "Distiller", error: FxDistillError) -> str:
    text, mode = f"{type(error).__name__}: {error}", distiller.plan.mode
    if mode == "one_graph" or not isinstance(error, CaptureError):
        return text
    # What there is to do about it has been done.
    said = text.partition("\nWhat to do")[0]
    return f"{said}\nThe step itself runs: mode {mode!r} needs no graph of the models."


def _recipe(distiller: "Distiller") -> Recipe:
    """As a step is made; a step that runs as it is has its logits made."""
    recipe: Recipe = distiller._recipe()
    lowering = _lowering(distiller)
    fuse_head = recipe.fuse_head and distiller.plan.mode != "eager"
    return dataclasses.replace(recipe, lowering=lowering, fuse_head=fuse_head)


def _lowering(distiller: "Distiller") -> Lowering:
    """What a step is lowered by, as far as it is known what that allocates."""
    lowering = distiller.plan.lowering
    known = distiller.plan.mode == "one_graph" and lowering.backend in ("inductor", "aot_eager")
    return lowering if known else dataclasses.replace(lowering, backend="aot_eager", options={})


# ---------------------------------------------------------------------- what needs no capture


def _known(distiller: "Distiller", towers: tuple[Tower, ...], call: Call, given: bool) -> Report:
    plan, objective = distiller.plan, distiller.objective
    backend = "" if plan.mode == "eager" else plan.lowering.backend
    pairs = tuple(_pairs(distiller, None))
    terms = tuple(_terms(distiller, objective.label_loss if _labelled(call) else None))
    return Report(
        schema=SCHEMA,
        fxdistill=fxdistill.__version__,
        torch=torch.__version__,
        mode=plan.mode,
        backend=backend if isinstance(backend, str) else _name(backend),
        mesh=_mesh(distiller),
        inputs={name: value_of(tensor) for name, tensor in tensors_of(call).items()},
        towers=towers,
        pairs=pairs,
        terms=terms,
        events=tuple(Event(*event) for event in distiller.past.events),
        # The numbers of a call that is only remembered are not those that it had.
        warnings=(
            *warnings_of(distiller, call if given else None),
            *_odd_weights((*terms, *pairs)),
        ),
        notes=(*distiller.matches.notes, *distiller._notes),
    )


def _mesh(distiller: "Distiller") -> dict[str, int]:
    """The mesh that parameters lie on, by dimension."""
    models = (distiller.student, distiller.teacher)
    placed: Any = next((p for m in models for p in m.parameters() if is_placed(p)), None)
    if placed is None:
        return {}
    mesh = placed.device_mesh
    names = mesh.mesh_dim_names or tuple(map(str, range(mesh.ndim)))
    return dict(zip(names, mesh.shape, strict=True))


def _name(value: Any) -> str:
    return str(getattr(value, "__name__", type(value).__name__))


def _labelled(call: Call) -> bool:
    return call.batch.labels is not None


def _of_mode(distiller: "Distiller") -> Iterator[str]:
    mode, backend = distiller.plan.mode, distiller.plan.lowering.backend
    if mode != "one_graph":
        yield (
            f"costs are those of one graph whose operators run one by one; this distiller runs "
            f"{mode}, where the models keep what autograd keeps"
        )
    elif backend not in ("inductor", "aot_eager"):
        yield "costs are those of operators that run one by one: what the backend does is unknown"


def value_of(tensor: Tensor) -> Value:
    """Shape, type and placements."""
    placed = tuple(map(str, tensor.placements)) if is_placed(tensor) else ()
    return Value(tuple(int(size) for size in tensor.shape), dtype_name(tensor), placed)


def _value_of(tensor: Tensor | None) -> Value | None:
    """``None`` as well where sizes depend on values."""
    try:
        return None if tensor is None else value_of(tensor)
    except GuardOnDataDependentSymNode:
        return None


def _pairs(distiller: "Distiller", table: TapTable | None) -> Iterator[Pair]:
    values = {} if table is None else table.values
    ours, theirs = roles_in(distiller.student), roles_in(distiller.teacher)
    for term in distiller.objective.features:
        student, teacher = (values.get(key) for key in term.taps)
        yield Pair(
            term.name,
            str(term.student),
            str(term.teacher),
            loss_name(term.loss),
            _number(distiller._settings[term.name]),
            between(term, distiller.projections),
            _value_of(student),
            _value_of(teacher),
            ours.get(term.student.path, ("",))[0],
            theirs.get(term.teacher.path, ("",))[0],
            projection_of(term, distiller.projections),
        )


def _terms(distiller: "Distiller", label_loss: Any) -> Iterator[Term]:
    objective, settings = distiller.objective, distiller._settings
    if objective.logit_loss is not None:
        yield Term("logits", loss_name(objective.logit_loss), _number(settings["logit_weight"]))
    if label_loss is not None:
        yield Term("labels", loss_name(label_loss), _number(settings["label_weight"]))
    if objective.features:
        names = sorted({loss_name(term.loss) for term in objective.features})
        yield Term("features", ", ".join(names), _number(settings["feature_weight"]))


def _odd_weights(weighted: Iterable[Pair | Term]) -> Iterator[str]:
    for one in weighted:
        if not math.isfinite(one.weight):
            yield f"the weight of {one.name} is {one.weight}, and so will the total be"


def _number(value: float | Tensor) -> float:
    with unset_fake_temporarily():  # a real number, where models without values stand in
        return float(value)


# ---------------------------------------------------------------------- what a capture tells


def _with_costs(report: Report, distiller: "Distiller", call: Call, halves: Halves) -> Report:
    towers = tuple(_with_blocks(distiller, tower, halves) for tower in report.towers)
    paths = {tower.name: [block.path for block in tower.blocks] for tower in towers}
    return dataclasses.replace(
        report,
        towers=towers,
        flops=flops(halves),
        memory=_memory(distiller, halves, paths),
        plain=_plain(distiller, call, paths),
        collectives=traffic(halves),
        casts=casts(halves),
        warnings=(*report.warnings, *gradients_and_writes.warnings_of(distiller, call, halves)),
        notes=(
            *report.notes,
            *_of_mode(distiller),
            *gradients_and_writes.notes_of(distiller, halves),
            *notes_of(halves),
        ),
    )


def _with_blocks(distiller: "Distiller", tower: Tower, halves: Halves) -> Tower:
    """With the costs of its blocks, of which those stay that hold or do something."""
    blocks = list(blocks_of(getattr(distiller, tower.name)))
    found = by_block(halves, {tower.name: [block.path for block in blocks]})

    def counted(block: Block) -> Block:
        forward, backward = (
            found.get((tower.name, block.path, half), 0) for half in ("forward", "backward")
        )
        return dataclasses.replace(block, forward=forward, backward=backward)

    parts = [part for part in map(counted, blocks) if part.parameters or part.forward]
    return dataclasses.replace(tower, blocks=tuple(parts))


def _memory(distiller: "Distiller", halves: Halves, paths: Paths) -> Memory:
    weights = _weights(distiller)
    gradients = bytes_here(gradients_and_writes.learning(distiller, halves).values())
    # torch's optimizers keep their states in the type of the parameter.
    states = {"SGD": 0, "SGD with momentum": gradients, "Adam, AdamW": 2 * gradients}
    return memory.memory(halves, weights, gradients, states, _heads(distiller), paths)


def _weights(distiller: "Distiller") -> dict[str, int]:
    """Bytes of parameters and buffers here; what towers share is the student's."""
    seen: set[int] = set()
    found = {}
    for name in ("student", "teacher", "projections"):
        module: nn.Module = getattr(distiller, name)
        own = [t for t in (*module.parameters(), *module.buffers()) if id(t) not in seen]
        seen.update(map(id, own))
        found[name] = bytes_here(own)
    return found


def _heads(distiller: "Distiller") -> dict[str, tuple[str, int]]:
    """Where each tower makes its logits, and how wide they are."""
    found = {}
    for tower in ("student", "teacher"):
        model = getattr(distiller, tower)
        if (path := head_path(model)) is not None:
            found[tower] = path, int(model.get_submodule(path).out_features)
    return found


def _plain(distiller: "Distiller", call: Call, paths: Paths) -> Plain | None:
    """The student alone on the same labels."""
    objective = distiller._objective_of(call)
    if objective.label_loss is None:
        return None
    alone = dataclasses.replace(objective, features=(), logit_loss=None)
    recipe = dataclasses.replace(_recipe(distiller), passes=(), fuse_head=False)
    _, halves, _ = distiller.dry(call, alone, recipe, cut=True)
    if halves is None:  # labels alone teach nothing: what learns is reached by matches
        return None
    weights = {"student": _weights(distiller)["student"]}
    gradients = bytes_here(gradients_and_writes.learning(distiller, halves).values())
    found = memory.memory(halves, weights, gradients, {}, _heads(distiller), paths)
    total = flops(halves).total
    return Plain(total, found.peak, gradients, found.saved, found.head, found.transient)
