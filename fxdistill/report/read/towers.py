"""The models of a distiller: their parameters and blocks, from their structure alone."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from fxdistill.base.tensors import is_placed
from fxdistill.graph.sections import BESIDE
from fxdistill.models.structure import Block, stacks_of
from fxdistill.report.data import BlockLine, TowerFacts
from fxdistill.report.subject import Subject


def towers_of(subject: Subject) -> tuple[TowerFacts, ...]:
    """The models in the order in which they run, and what is beside them, if there is any."""
    found = [
        tower(name, model, trains=name not in subject.frozen)
        for name, model in subject.models.items()
    ]
    beside = [(name, subject.parts[name]) for name in BESIDE]
    found += [tower(name, part, trains=True) for name, part in beside if list(part.children())]
    return tuple(found)


def tower(name: str, model: nn.Module, *, trains: bool) -> TowerFacts:
    """Count the parameters of ``model``; those that its modules share are counted once."""
    parameters = list(model.parameters())
    return TowerFacts(
        name,
        type(model).__name__,
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if trains and p.requires_grad),
        bytes_here((*parameters, *model.buffers())),
        tuple(sorted({dtype_name(p) for p in parameters})),
        any(module.training for module in model.modules()),
        tuple(block for block in blocks_of(model) if block.parameters),
        tuple(sorted({str(p.device) for p in parameters})),
    )


def bytes_here(values: Iterable[Tensor]) -> int:
    """The bytes of ``values`` on this rank; a DTensor counts its shard, a repeated value once."""
    sizes = {}
    for value in values:
        local = value.to_local() if is_placed(value) else value
        sizes[id(value)] = local.numel() * local.element_size()
    return sum(sizes.values())


def dtype_name(value: Tensor) -> str:
    """``float32`` for ``torch.float32``."""
    return str(value.dtype).removeprefix("torch.")


def blocks_of(model: nn.Module) -> Iterator[BlockLine]:
    """The repeated blocks, the modules outside them, and the modules that contain blocks.

    A module that contains blocks counts only the parameters that are directly its own, if any.
    """
    if isinstance(model, nn.ModuleList):  # the projections: each is a part of its own
        for name, module in model.named_children():
            yield BlockLine(name, (), sum(p.numel() for p in module.parameters()))
        return
    inside = {block.path: block for stack in stacks_of(model) for block in stack.blocks}
    yield from _under(model, "", inside)


def _under(module: nn.Module, path: str, inside: dict[str, Block]) -> Iterator[BlockLine]:
    holds = any(found.startswith(f"{path}.") or not path for found in inside)
    if path in inside or not holds or not list(module.children()):
        parts = inside[path].parts if path in inside else ()
        kinds = tuple((part.path, part.kind) for part in parts)
        yield BlockLine(path, kinds, sum(p.numel() for p in module.parameters()))
        return
    yield BlockLine(path, (), sum(p.numel() for p in module.parameters(recurse=False)))
    for name, child in module.named_children():
        yield from _under(child, f"{path}.{name}" if path else name, inside)
