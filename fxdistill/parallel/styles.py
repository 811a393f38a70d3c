"""Parallel styles at the borders of sharded modules: they gather or scatter tokens.

Unlike torch's ``PrepareModuleInput``, they change only the first floating-point input, positional
or by keyword: a mixer's masks and position embeddings are the same on every rank.
"""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from fxdistill.base.placement import placed

Side = Literal["inputs", "output"]
Relayout = Callable[[Tensor, DeviceMesh], Tensor]


class TokenStyle(ParallelStyle):
    """Change the first floating-point input of a module, or its first output."""

    def __init__(self, changes: list[tuple[Side, Relayout]]) -> None:
        super().__init__()
        self.changes = changes

    def after(self, other: ParallelStyle) -> "TokenStyle":
        """Combine with ``other``: this style comes first on inputs, ``other`` first on outputs."""
        assert isinstance(other, TokenStyle)
        inputs = [c for c in (*self.changes, *other.changes) if c[0] == "inputs"]
        outputs = [c for c in (*other.changes, *self.changes) if c[0] == "output"]
        return TokenStyle([*inputs, *outputs])

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for side, change in self.changes:
            if side == "inputs":
                module.register_forward_pre_hook(_on_inputs(change, device_mesh), with_kwargs=True)
            else:
                module.register_forward_hook(_on_output(change, device_mesh))
        return module


class GatherTokens(TokenStyle):
    """Gather all tokens on every rank: an output, or a ``local`` input, as a plain tensor."""

    def __init__(self, side: Side, *, local: bool = False) -> None:
        super().__init__([(side, _to_local if local or side == "output" else _gathered)])

    def then_scatter(self) -> TokenStyle:
        """Also shard the output, which is the same on every rank, by its tokens."""
        return TokenStyle([*self.changes, ("output", _scattered)])


class ScatterTokens(TokenStyle):
    """Shard a tensor that is the same on every rank by its tokens, ``Shard(1)``."""

    def __init__(self, side: Side) -> None:
        super().__init__([(side, _scattered)])


def _everywhere(mesh: DeviceMesh) -> list[Placement]:
    return [Replicate()] * mesh.ndim


def _gathered(x: Tensor, mesh: DeviceMesh) -> Tensor:
    return placed(x, mesh, _everywhere(mesh))


def _to_local(x: Tensor, mesh: DeviceMesh) -> Tensor:
    return placed(x, mesh, _everywhere(mesh)).to_local()


def _scattered(x: Tensor, mesh: DeviceMesh) -> Tensor:
    return placed(x, mesh, [Shard(1)] * mesh.ndim)


def _is_stream(x: Any) -> bool:
    return isinstance(x, Tensor) and (isinstance(x, DTensor) or x.is_floating_point())


def _on_inputs(change: Relayout, mesh: DeviceMesh) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        for i, value in enumerate(args):
            if _is_stream(value):
                return (*args[:i], change(value, mesh), *args[i + 1 :]), kwargs
        for name, value in kwargs.items():
            if _is_stream(value):
                return args, {**kwargs, name: change(value, mesh)}
        return args, kwargs

    return hook


def _on_output(change: Relayout, mesh: DeviceMesh) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output, mesh)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (change(output[0], mesh), *output[1:])
        return output

    return hook
