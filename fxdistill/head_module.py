"""The module that makes a model's logits: where it is, and whether it can be kept from it.

Private to torch and used here only: the dictionaries of backward hooks. If they move, regional mode
fails in the first call.
"""

import functools
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxdistill.hooks import compiles_itself
from fxdistill.landmarks import asked
from fxdistill.losses.reduce import is_placed


def head_path(model: nn.Module) -> str | None:
    """The linear layer that makes the logits, by what the model says.

    If it says nothing: the last one outside of lists that is as wide as an embedding has entries.
    """
    own = asked(model, "get_output_embeddings")
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if own is not None:
        return next((name for name, module in linear if module is own), None)
    entries = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    outside = [(n, m) for n, m in linear if not any(part.isdigit() for part in n.split("."))]
    return next((n for n, m in reversed(outside) if m.out_features in entries), None)


def head_of(model: nn.Module, path: str | None) -> nn.Linear | None:
    """The module at ``path``, if it is a linear layer that nothing has changed or compiled.

    ``None`` too in wrappers that shard a model, or wait for its outputs in the backward: those must
    see its logits.
    """
    if path is None or any(_is_wrapper(type(module).__mro__) for module in model.modules()):
        return None
    head = model.get_submodule(path)
    if any(is_traceable_wrapper_subclass(parameter) for parameter in head.parameters()):
        return None
    names = path.split(".")
    around = [model.get_submodule(".".join(names[:end])) for end in range(len(names) + 1)]
    # What waits for gradients, of these or of all modules, must see the logits that have them.
    if any(compiles_itself(m) or _waits(m) for m in around):
        return None
    if type(head) is not nn.Linear or "forward" in head.__dict__ or _any_waits():
        return None
    return head


def sharded_vocabularies(
    models: Mapping[str, nn.Module], paths: Iterable[str | None]
) -> dict[str, tuple[int, int]]:
    """By tower, where its head is sharded: how many entries are here, and how many in all."""
    found = {}
    for (tower, model), path in zip(models.items(), paths, strict=True):
        weight = None if path is None else getattr(model.get_submodule(path), "weight", None)
        if is_placed(weight):
            found[tower] = (weight.to_local().shape[0], weight.shape[0])
    return found


def mesh_sizes(model: nn.Module) -> frozenset[int]:
    """The sizes of the mesh dimensions that may shard a sequence: not those of samples."""
    meshes = {p.device_mesh for p in model.parameters() if is_placed(p)}
    if not meshes or any(_is_wrapper(type(module).__mro__) for module in model.modules()):
        return frozenset()
    return frozenset(
        size
        for mesh in meshes
        for name, size in zip(mesh.mesh_dim_names or ("",) * mesh.ndim, mesh.shape, strict=True)
        if name not in ("dp", "replicate")
    )


@functools.cache
def _is_wrapper(bases: tuple[type, ...]) -> bool:
    wrappers = ("torch.distributed", "torch.nn.parallel", "deepspeed")
    return any(base.__module__.startswith(wrappers) for base in bases)


def _waits(module: nn.Module) -> bool:
    return bool(module._backward_hooks or module._backward_pre_hooks)


def _any_waits() -> bool:
    """Whether there are backward hooks of all modules."""
    hooks = torch.nn.modules.module
    return bool(hooks._global_backward_hooks or hooks._global_backward_pre_hooks)
