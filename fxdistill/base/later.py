"""Modules that are imported on first use.

Some modules import ``torch.distributed``, which a build of torch may lack. Their package offers
them as attributes (``parallel.setup``), and code reads such an attribute only once it has a DTensor
or a mesh.
"""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType


def later(folder: str, *files: str) -> Callable[[str], ModuleType]:
    """Make a ``__getattr__`` for a package that imports each of ``files`` on first use."""

    def found(name: str) -> ModuleType:
        if name not in files:
            raise AttributeError(f"module {folder!r} has no attribute {name!r}")
        return import_module(f"{folder}.{name}")

    return found
