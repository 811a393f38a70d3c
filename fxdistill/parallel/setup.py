"""Set up ``wrap(..., mesh=)``: check mesh and models, plan, compare ranks, and shard."""

import fnmatch
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement
from torch.distributed.tensor.parallel import ParallelStyle

from fxdistill.base.ranks import Ranks
from fxdistill.base.tensors import is_placed
from fxdistill.errors import DeviceError, MeshError, OptionError, PathError, did_you_mean
from fxdistill.models.devices import device_of
from fxdistill.models.tap import ATTENTION, Tap, Tower
from fxdistill.parallel.plan import TensorPlan, ready_made
from fxdistill.parallel.sharding import DATA, TENSOR, Axes, Sharding, shard

Plan = Mapping[str, Any] | None


class OnMesh(NamedTuple):
    """Sharded models; ``ranks`` over which samples are split, or ``None``."""

    shardings: Mapping[str, Sharding]
    ranks: Ranks | None
    notes: tuple[str, ...]


def set_up(
    models: Mapping[Tower, nn.Module],
    plans: Mapping[Tower, Plan],
    mesh: DeviceMesh,
    taps: Iterable[tuple[Tower, Tap]],
    asked: str,
    frozen: Collection[Tower],
) -> OnMesh:
    """Shard ``models`` in place.

    ``taps`` must be values with a known placement; ``asked`` is text that must be the same on all
    ranks; ``frozen`` models learn nothing.

    The checks run before any change, on every rank, except that of tied parameters. They raise
    MeshError, OptionError, PathError or DeviceError.
    """
    axes = _axes(mesh)
    made: dict[str, TensorPlan] = {}
    for tower, model in models.items():
        _check_model(tower, model, mesh)
        made[tower] = _plan(tower, model, plans.get(tower), axes, tower not in frozen)
    _check_apart(models)
    for tower, tap in taps:
        _check_tap(tower, tap, made[tower])
    _check_agreement(mesh, "\n".join([asked, *_described(models, made)]))
    shardings = {tower: shard(model, axes, made[tower]) for tower, model in models.items()}
    make_alike(models.values(), [mesh])
    notes = tuple(note for plan in made.values() for note in plan.notes)
    return OnMesh(shardings, _ranks(axes), notes)


def _axes(mesh: Any) -> Axes:
    if not isinstance(mesh, DeviceMesh):
        raise OptionError(f"mesh is a {type(mesh).__name__}: torch's init_device_mesh makes one")
    names, known = mesh.mesh_dim_names or (), (*DATA, TENSOR)
    if not names or any(name not in known for name in names):
        raise MeshError(
            f"the mesh has dimensions {names or 'without names'}: fxdistill reads 'dp' (samples, "
            "and shards of the parameters), 'tp' (tensor and sequence parallel) and 'replicate' "
            "(samples only). init_device_mesh(..., mesh_dim_names=('dp', 'tp'))."
        )
    return Axes.of(mesh)


def _check_model(tower: Tower, model: nn.Module, mesh: DeviceMesh) -> None:
    if any(is_placed(parameter) for parameter in model.parameters()):
        raise MeshError(
            f"the {tower} is parallel already (its parameters are DTensors): leave mesh= out, and "
            "it is taken as it is; or hand it over as a plain model."
        )
    if (device := device_of(model)).type != mesh.device_type:
        raise DeviceError(
            f"the {tower} is on {device}, and the mesh is of {mesh.device_type!r} devices: "
            f"model.to({mesh.device_type!r}) before wrap."
        )


def _check_apart(models: Mapping[Tower, nn.Module]) -> None:
    for (one, first), (other, second) in itertools.combinations(models.items(), 2):
        own = {id(parameter): name for name, parameter in first.named_parameters()}
        shared = [own[id(p)] for p in second.parameters() if id(p) in own]
        if shared:
            raise MeshError(
                f"{one} and {other} share {len(shared)} parameters ({shared[0]}, ...), which mesh= "
                f"cannot shard for both: give the {other} a copy, or parallelize the models "
                "yourself and leave mesh= out."
            )


def _plan(tower: Tower, model: nn.Module, plan: Plan, axes: Axes, learns: bool) -> TensorPlan:
    if axes.tensor is None:
        if plan is not None:
            raise OptionError(f"{tower}_plan is for a mesh dimension 'tp', and there is none")
        return TensorPlan()
    if plan is None:
        return ready_made(model, axes.tensor.size(), tower, learns=learns)
    modules = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters()]
    styles: dict[str, ParallelStyle] = {}
    placements: dict[str, Placement] = {}
    for pattern, value in plan.items():
        if isinstance(value, ParallelStyle):
            styles.update(dict.fromkeys(_found(tower, pattern, modules), value))
            continue
        kinds = list(value) if isinstance(value, Sequence) else [value]
        if len(kinds) != 1 or not isinstance(kinds[0], Placement):
            raise OptionError(
                f"{tower}_plan[{pattern!r}] is {value!r}: a ParallelStyle of a module, or the "
                "placement of a parameter over 'tp'"
            )
        placements.update(dict.fromkeys(_found(tower, pattern, parameters), kinds[0]))
    return TensorPlan(styles, placements)


def _found(tower: Tower, pattern: str, names: Iterable[str]) -> list[str]:
    """The names that ``pattern`` matches, ``*`` within one segment; PathError if there are none."""
    parts, names = pattern.split("."), list(names)
    found = [
        name
        for name in names
        if len(segments := name.split(".")) == len(parts)
        and all(map(fnmatch.fnmatchcase, segments, parts))
    ]
    if not found:
        near = did_you_mean(pattern, names)
        raise PathError(f"{tower}_plan: {pattern!r} matches nothing. Nearest: {near}.")
    return found


def _check_tap(tower: Tower, tap: Tap, plan: TensorPlan) -> None:
    """Raise MeshError for a tap in a sharded part without a style: its value is one rank's own."""
    inside = tap.port.partition(".")[0] == ATTENTION  # what runs within the module
    part = next(
        (
            part
            for part in plan.sharded
            if tap.path.startswith(f"{part}.")
            or (inside and f"{part}.".startswith(f"{tap.path}." if tap.path else ""))
        ),
        None,
    )
    output = tap.reads is None and tap.port.startswith("output") and tap.path in plan.styles
    if part is not None and not output:
        raise MeshError(
            f"{tower} {str(tap)!r} lies within {part!r}, which is sharded: what stands there is a "
            f"rank's own. Match {part!r} or what one of its linear layers returns, or leave that "
            f"part whole: {tower}_plan={{...}}."
        )


def _ranks(axes: Axes) -> Ranks | None:
    if axes.data is None:
        return None
    groups = axes.data.get_all_groups()
    names = tuple(str(group.group_name) for group in groups)
    return Ranks(names, axes.data.size(), positions=tuple(group.rank() for group in groups))


def _described(models: Mapping[Tower, nn.Module], plans: Mapping[str, TensorPlan]) -> Iterable[str]:
    for tower, model in models.items():
        for name, p in model.named_parameters():
            yield f"{tower} {name} {list(p.shape)} {p.dtype} {p.requires_grad}"
        for path, style in plans[tower].styles.items():
            yield f"{tower} {path} {type(style).__name__}"


def _check_agreement(mesh: DeviceMesh, text: str) -> None:
    """Raise MeshError on every rank if ``text`` differs between ranks, which later would hang.

    Every rank hears of all others, one mesh dimension after the other, before any raises: the
    others would wait for a rank that left early.
    """
    heard = {dist.get_rank(): text}
    for group in mesh.get_all_groups():
        if dist.get_backend(group) == "fake":  # a mesh for planning only: there are no other ranks
            continue
        told: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(told, heard, group=group)
        heard = {rank: said for each in told for rank, said in each.items()}
    first, *others = sorted(heard)
    for rank in others:
        if heard[rank] != heard[first]:
            lines = itertools.zip_longest(heard[first].splitlines(), heard[rank].splitlines())
            one, other = next((a, b) for a, b in lines if a != b)
            raise MeshError(
                f"ranks disagree on what to wrap: rank {first} has {one!r}, rank {rank} has "
                f"{other!r}. Build models, mapping and options alike on every rank."
            )


def make_alike(modules: Iterable[nn.Module], meshes: Iterable[DeviceMesh]) -> None:
    """Give all ranks the plain parameters and buffers of the first rank."""
    for mesh in sorted(meshes, key=str):  # a set has another order on each rank
        for group in mesh.get_all_groups():
            source = dist.get_global_rank(group, 0)
            for module in modules:
                for tensor in (*module.parameters(), *module.buffers()):
                    if not is_placed(tensor):
                        value = torch.view_as_real(tensor) if tensor.is_complex() else tensor
                        with torch.no_grad():
                            dist.broadcast(value, source, group=group)
