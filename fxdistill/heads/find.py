"""Find the module that computes a model's logits, and whether it may return a stand-in for them.

Private to torch and used here only: the dictionaries of backward hooks. If they move, regional mode
fails in the first call.
"""

import functools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxdistill import parallel
from fxdistill.base.tensors import is_placed
from fxdistill.heads.curve import Unreadable
from fxdistill.heads.hold_back import DeferrableHead
from fxdistill.models.tap import Tower
from fxdistill.taps.hooks import compiles_itself


@dataclass(frozen=True)
class Found:
    """The heads that may return stand-ins, or the reason why the models must make all logits."""

    heads: tuple[DeferrableHead, ...] = ()
    why_not: str = ""


def deferrable(
    models: Mapping[Tower, nn.Module],
    paths: Mapping[Tower, str | None],
    needed: Collection[Tower],
) -> Found:
    """The heads at ``paths`` that may return stand-ins; none if a ``needed`` model's may not."""
    found = {tower: _asked(tower, model, paths[tower]) for tower, model in models.items()}
    reasons = (found[tower] for tower in models if tower in needed)
    why_not = next((reason for reason in reasons if isinstance(reason, str)), "")
    heads = [head for head in found.values() if isinstance(head, DeferrableHead)]
    return Found(why_not=why_not) if why_not else Found(tuple(heads))


def _asked(tower: Tower, model: nn.Module, path: str | None) -> DeferrableHead | str:
    try:
        return head_of(model, path)
    except Unreadable as why:
        return f"the {tower}'s {why}"


def head_of(model: nn.Module, path: str | None) -> DeferrableHead:
    """The module at ``path``, if it is a linear layer that nothing has changed or compiled.

    Raises Unreadable for any other module. Also raises it for a model in a wrapper other than FSDP2
    and for a head with backward hooks around it, because these must see the logits.
    """
    if path is None:
        raise Unreadable("head is no module that could be found")
    head = model.get_submodule(path)
    found, linear = _in_wrappers(model, head)
    names = path.split(".")
    around = [model.get_submodule(".".join(names[:end])) for end in range(len(names) + 1)]
    if linear is not nn.Linear or "forward" in head.__dict__:
        raise Unreadable(f"head {path!r} is no plain linear layer")
    if any(compiles_itself(module) for module in around):
        raise Unreadable(f"head {path!r} is compiled by itself")
    # A backward hook, of one of these modules or of all modules, needs logits that have gradients.
    if any(map(_waits, around)) or _any_waits():
        raise Unreadable(f"head {path!r} has backward hooks around it")
    return found


def _in_wrappers(model: nn.Module, head: nn.Module) -> tuple[DeferrableHead, type]:
    """The head, and its class before ``fully_shard``; raises Unreadable for other wrappers."""
    wrappers = [m for m in model.modules() if _is_wrapper(type(m).__mro__)]
    if others := [type(m).__name__ for m in wrappers if not _is_fsdp2(type(m).__mro__)]:
        raise Unreadable(f"logits are for {others[0]} to see, which wraps the model")
    found, linear = DeferrableHead(cast(nn.Linear, head)), type(head)
    if wrappers:
        found = head_in_fsdp(wrappers, found.module)
        linear = parallel.fsdp2.class_behind(head)
    unread = [p for p in head.parameters() if is_traceable_wrapper_subclass(p)]
    if unread and not found.gathered:
        if any(map(is_placed, unread)):
            raise Unreadable("head is sharded, and not by fully_shard alone")
        raise Unreadable(f"head reads a {type(unread[0]).__name__}, no plain tensor")
    return found, linear


def sharded_vocabularies(
    models: Mapping[Tower, nn.Module], paths: Mapping[Tower, str | None]
) -> dict[Tower, tuple[int, int]]:
    """For each model with a sharded head, the vocabulary entries on this rank and in all."""
    found = {}
    for tower, model in models.items():
        path = paths[tower]
        weight = None if path is None else getattr(model.get_submodule(path), "weight", None)
        if is_placed(weight):
            found[tower] = (weight.to_local().shape[0], weight.shape[0])
    return found


class Meshes(NamedTuple):
    """Whether parameters of a model are DTensors, and the sizes of the dimensions they lie on.

    ``sizes`` are those of dimensions that may shard a sequence, not those that shard samples.
    """

    placed: bool = False
    sizes: frozenset[int] = frozenset()


def meshes_of(model: nn.Module) -> Meshes:
    """Where the parameters of ``model`` lie; a wrapper's dimensions shard no sequence."""
    meshes = {p.device_mesh for p in model.parameters() if is_placed(p)}
    if not meshes or any(_is_wrapper(type(module).__mro__) for module in model.modules()):
        return Meshes(bool(meshes))
    sizes = (
        size
        for mesh in meshes
        for name, size in zip(mesh.mesh_dim_names or ("",) * mesh.ndim, mesh.shape, strict=True)
        if name not in ("dp", "replicate")
    )
    return Meshes(True, frozenset(sizes))


@functools.cache
def _is_wrapper(bases: tuple[type, ...]) -> bool:
    wrappers = ("torch.distributed", "torch.nn.parallel", "deepspeed")
    # Checkpoint wrappers neither shard nor add hooks; a head inside one is noticed when it runs.
    checkpoints = "torch.distributed.algorithms._checkpoint"
    modules = [b.__module__ for b in bases if not b.__module__.startswith(checkpoints)]
    return any(name.startswith(wrappers) for name in modules)


def _is_fsdp2(bases: tuple[type, ...]) -> bool:
    """Whether these are the base classes of a module on which ``fully_shard`` was called."""
    modules = [base.__module__ for base in bases if base.__name__ == "FSDPModule"]
    return any(module.startswith("torch.distributed.fsdp") for module in modules)


def _waits(module: nn.Module) -> bool:
    return bool(module._backward_hooks or module._backward_pre_hooks)


def _any_waits() -> bool:
    """Whether there are global backward hooks, which run for every module."""
    hooks = torch.nn.modules.module
    return bool(hooks._global_backward_hooks or hooks._global_backward_pre_hooks)


def head_in_fsdp(wrappers: Iterable[nn.Module], head: nn.Linear) -> DeferrableHead:
    """The head of a model whose ``wrappers`` are FSDP2's; Unreadable if it is tensor parallel too.

    FSDP2 gathers the head's weights before the forward of the module that owns them. It may free
    them after that forward, and otherwise keeps them until the backward; ``freed`` asks when the
    head runs, because the root module decides in its first forward. FSDP2 gets the gradient through
    the gathered parameter.
    """
    owned = [
        (group, p)
        for group, p in parallel.fsdp2.sharded_parameters(wrappers)
        if head in parallel.fsdp2.owners(p)
    ]
    if any(p.is_dtensor for _, p in owned):
        raise Unreadable("head is tensor parallel inside of fully_shard")
    groups = [group for group, _ in owned]

    def freed() -> bool:
        return any(group._reshard_after_forward for group in groups)

    return DeferrableHead(head, gathered=bool(owned), freed=freed, awaits=parallel.fsdp2.awaits)
