"""Let torch's cache keys name a mesh by what code depends on, the same way in every process.

torch 2.13 pickles a mesh among the inputs into the key, and leaves its pickler's ``fast`` mode for
the rest of the key: what follows then depends on which equal objects are one object, and the key is
another one in each process. Here the mesh goes into the key as text: its ranks, this rank's
coordinates, the names and sizes of its groups (``parallel.named``).

Private to torch and used here only: ``_reduce_fake_script_object`` of ``FxGraphCachePickler``, and
``real_obj`` of the objects that it is given. Where the first is missing, or a mesh hides a part of
what decides, torch's own key is kept, and a second process compiles anew.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._inductor.codecache import FxGraphCachePickler

from fxdistill import parallel

_REDUCE = "_reduce_fake_script_object"


def on_ranks() -> bool:
    """Whether this process is one of several that torch.distributed knows."""
    ranks = torch.distributed
    return ranks.is_available() and ranks.is_initialized()


@contextlib.contextmanager
def meshes_named() -> Iterator[None]:
    """Name meshes by their places in all keys that are formed while the body runs."""
    torchs_own = getattr(FxGraphCachePickler, _REDUCE, None)
    if torchs_own is None or not on_ranks():
        yield
        return

    def reduced(pickler: Any, opaque: Any) -> Any:
        try:
            name = parallel.named.place_of(opaque.real_obj)
        except AttributeError:
            name = None
        return torchs_own(pickler, opaque) if name is None else (str, (name,))

    setattr(FxGraphCachePickler, _REDUCE, reduced)
    try:
        yield
    finally:
        setattr(FxGraphCachePickler, _REDUCE, torchs_own)
