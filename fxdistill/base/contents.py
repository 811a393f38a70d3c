"""What tensors hold, compared by value: a write through ``.data`` moves no version counter.

torch's own batch normalization moves none either, so that versions alone do not tell.
"""

import torch
from torch import Tensor

from fxdistill.base.tensors import is_lazy

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def parts(x: Tensor) -> list[Tensor]:
    """The plain tensors that ``x`` is made of: those of a subclass, such as a DTensor, or itself.

    What has no values (on the meta device, or of a layer that is not yet built) has no parts.
    """
    if is_lazy(x):
        return []
    if hasattr(x, "__tensor_flatten__"):
        names, _ = x.__tensor_flatten__()
        # Since torch 2.13 a DTensor names its mesh beside the tensor of this rank.
        held = [getattr(x, name) for name in names]
        return [part for y in held if isinstance(y, Tensor) for part in parts(y)]
    return [] if x.is_meta else [x.detach()]


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two plain tensors of one shape hold the same values, NaN beside NaN."""
    if a.layout != torch.strided or a.is_quantized:
        return False
    return bool((_bits(a) == _bits(b)).all())


def mark(x: Tensor) -> tuple[int, Tensor] | None:
    """What moves when ``x``, a plain tensor, is written: its version, and the sum of its bits.

    ``None`` where there is no such sum (sparse and old quantized tensors). A sum needs no copy of
    the values. It stays where they only change places, or where as many signs turn one way as the
    other; what a forward writes into a parameter does neither.
    """
    if x.layout != torch.strided or x.is_quantized:
        return None
    version = 0 if x.is_inference() else x._version
    return version, _bits(x).sum(dtype=torch.int64)


def _bits(x: Tensor) -> Tensor:
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return x.resolve_neg().view(_BITS[x.element_size()])
