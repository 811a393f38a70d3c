"""Models on a mesh: parameters become DTensors in place, and a step gathers them for use.

A parameter is placed on the whole mesh: over ``tp`` as the plan says, and over ``dp`` sharded along
one axis. A step gathers this axis and scatters its gradient (FSDP, Zhao et al., 2023, but in the
graph, where a compiler sees it; the form is that of torchtitan's SimpleFSDP, Zhang et al., 2024).
The axis is the first that ``tp`` leaves whole, so that no placement is strided, and that has an
entry for every rank; a parameter without such an axis is replicated. Over ``replicate`` all
parameters are replicated (HSDP).

``gathered`` makes the weights that a step uses, and ``functional_call`` puts them in: modules and
their parameters stay as they are.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import parallelize_module

from fxdistill.errors import MeshError
from fxdistill.parallel.plan import TensorPlan

TENSOR, DATA = "tp", ("replicate", "dp")


@dataclass(frozen=True)
class Axes:
    """The dimensions of a mesh by purpose: ``data`` has samples, ``tensor`` is tensor parallel."""

    mesh: DeviceMesh
    data: DeviceMesh | None
    tensor: DeviceMesh | None

    @classmethod
    def of(cls, mesh: DeviceMesh) -> "Axes":
        """Split ``mesh`` by the names of its dimensions, which are checked already."""
        names = mesh.mesh_dim_names or ()
        data = tuple(name for name in names if name in DATA)
        one = len(names) == 1
        return cls(
            mesh,
            None if not data else mesh if one else mesh[data],
            None if TENSOR not in names else mesh if one else mesh[TENSOR],
        )


@dataclass(frozen=True)
class StepWeight:
    """The weight that a step uses for one parameter: its shape and placements.

    ``shape`` and ``stride`` are those on a tensor-parallel rank, ``data`` its placements over the
    data dimensions. ``tensor``: its placement over ``tp``, ``None`` for a plain tensor. ``part``:
    it is the same on all ranks of ``tp``, each of which has a part of its gradient.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    whole_shape: torch.Size
    whole_stride: tuple[int, ...]
    data: tuple[Placement, ...]
    tensor: Placement | None
    part: bool


@dataclass(frozen=True)
class Sharding:
    """How one model is sharded on a mesh, by parameter."""

    axes: Axes
    weights: Mapping[str, StepWeight]

    @property
    def leaves_dtensors(self) -> bool:
        """Whether a step may use weights that are DTensors: only with ``tp``."""
        return self.axes.tensor is not None

    def gathered(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights that a step uses on this rank; MeshError if one was added since."""
        found = {}
        for name, parameter in model.named_parameters():
            if name not in self.weights:
                raise MeshError(f"{name!r} was added after wrap(mesh=): add it before")
            found[name] = gathered_weight(parameter, self.weights[name], self.axes)
        return found


def gathered_weight(parameter: Tensor, weight: StepWeight, axes: Axes) -> Tensor:
    """The weight that a step uses for one parameter, on this rank."""
    assert isinstance(parameter, DTensor)
    x = parameter.to_local()
    if (data := axes.data) is not None:
        here = DTensor.from_local(
            x, data, weight.data, run_check=False, shape=weight.shape, stride=weight.stride
        )
        whole = here.redistribute(data, [Replicate()] * data.ndim)
        x = whole.to_local(grad_placements=[Partial()] * data.ndim)
    if (tensor := axes.tensor) is None:
        return x
    if weight.tensor is not None:
        shape, stride = weight.whole_shape, weight.whole_stride
        kind = [weight.tensor]
        return DTensor.from_local(x, tensor, kind, run_check=False, shape=shape, stride=stride)
    if weight.part:
        alike = DTensor.from_local(x, tensor, [Replicate()], run_check=False)
        return alike.to_local(grad_placements=[Partial()])
    return x


def shard(model: nn.Module, axes: Axes, plan: TensorPlan) -> Sharding:
    """Turn the parameters of ``model`` into DTensors on the mesh, with the values of rank 0."""
    trained = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    if axes.tensor is not None:
        tied = _tied(model)
        for name, placement in plan.placements.items():
            _replace(model, name, _on_tensor_axis(model.get_parameter(name), axes, placement))
        parallelize_module(model, axes.tensor, dict(plan.styles))
        for names in tied:
            _tie(model, names)
    weights: dict[str, StepWeight] = {}
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in made:
            weights[name] = _weight(parameter, axes, name in plan.parts)
            # Not the flag of the parameter: torch's SequenceParallel loses requires_grad.
            made[id(parameter)] = _as_parameter(parameter, weights[name], axes, trained[name])
        _set(model, name, made[id(parameter)])
    return Sharding(axes, weights)


def _on_tensor_axis(parameter: nn.Parameter, axes: Axes, placement: Placement) -> nn.Parameter:
    value = distribute_tensor(parameter.detach(), axes.tensor, [placement])
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


def _weight(parameter: nn.Parameter, axes: Axes, part: bool) -> StepWeight:
    tensor = parameter.placements[0] if isinstance(parameter, DTensor) else None
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    free = [i for i in range(parameter.ndim) if tensor is None or not tensor.is_shard(i)]
    data: list[Placement] = []
    if axes.data is not None:
        names = axes.data.mesh_dim_names or ()
        for dim, name in enumerate(names):
            ranks = axes.data.size(dim)
            axis = next((i for i in free if parameter.shape[i] >= ranks), None)
            data.append(Replicate() if name != "dp" or axis is None else Shard(axis))
    return StepWeight(
        local.shape,
        local.stride(),
        parameter.shape,
        parameter.stride(),
        tuple(data),
        tensor,
        part,
    )


def _as_parameter(
    parameter: nn.Parameter, weight: StepWeight, axes: Axes, trained: bool
) -> nn.Parameter:
    """The parameter as a DTensor on the whole mesh; its storage holds the local part only."""
    value = parameter.detach()
    x = value.to_local() if isinstance(value, DTensor) else value
    if axes.data is not None:
        x = distribute_tensor(x, axes.data, list(weight.data)).to_local()
    if axes.tensor is not None and (weight.tensor is None or weight.tensor.is_replicate()):
        # A copy: the broadcast writes, and a wrap that fails must leave the parameter as it was.
        x = distribute_tensor(x.clone(), axes.tensor, [Replicate()]).to_local()
    own = x.clone() if x.untyped_storage().nbytes() > x.nbytes else x
    kinds = [*weight.data, *([] if axes.tensor is None else [weight.tensor or Replicate()])]
    names = axes.mesh.mesh_dim_names or ()
    order = [name for name in names if name in DATA] + [name for name in names if name == TENSOR]
    placements = [kinds[order.index(name)] for name in names]
    placed = DTensor.from_local(
        own,
        axes.mesh,
        placements,
        run_check=False,
        shape=weight.whole_shape,
        stride=weight.whole_stride,
    )
    return nn.Parameter(placed, requires_grad=trained)


def _tied(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [found for found in names.values() if len(found) > 1]


def _tie(model: nn.Module, names: list[str]) -> None:
    """Tie ``names`` again to one parameter: the sharded one, if there is one."""
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    placed = [name for name in names if isinstance(model.get_parameter(name), DTensor)]
    plain = [name for name in names if name not in placed]
    kinds = {model.get_parameter(name).placements for name in placed}  # type: ignore[attr-defined]
    alone = [n for n in plain if placed and isinstance(owners[n], (nn.Embedding, nn.Linear))]
    if len(kinds) > 1 or alone:
        raise MeshError(
            f"{' and '.join(names)} are one parameter, and the plan shards only "
            f"{' and '.join(placed)}, or each in another way: give all of them a style that keeps "
            "the weight in one place (an embedding RowwiseParallel, its head ColwiseParallel)."
        )
    one = model.get_parameter((placed or names)[0])
    for name in names:
        _set(model, name, one)


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, last = name.rpartition(".")
    model.get_submodule(path).register_parameter(last, parameter)


def _replace(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replace a parameter under all of its names."""
    old = model.get_parameter(name)
    for other, there in list(model.named_parameters(remove_duplicate=False)):
        if there is old:
            _set(model, other, parameter)


@contextlib.contextmanager
def kept_on_error(*models: nn.Module) -> Iterator[None]:
    """Restore parameters, buffers and hooks if the body raises."""
    undo = [_restorer(module) for model in models for module in model.modules()]
    try:
        yield
    except BaseException:
        for restore in undo:
            restore()
        raise


# The attribute that torch's distribute_module sets on a module, so as not to run on it twice.
_APPLIED = "_distribute_module_applied"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


def _restorer(module: nn.Module) -> Callable[[], None]:
    names = ("_parameters", "_buffers", *_HOOKS, "_forward_hooks_with_kwargs")
    before: list[tuple[Any, dict[Any, Any]]] = [
        (getattr(module, name), dict(getattr(module, name))) for name in names
    ]

    known = _APPLIED in vars(module)

    def restore() -> None:
        if not known:
            vars(module).pop(_APPLIED, None)
        for there, entries in before:
            there.clear()
            there.update(entries)

    return restore
