"""Files that are imported when they are first asked for.

Some files import ``torch.distributed``, which a build of torch may lack. Their folder offers them
as attributes, ``parallel.setup``, and whoever meets a DTensor or a mesh asks for one.
"""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType


def later(folder: str, *files: str) -> Callable[[str], ModuleType]:
    """Make the ``__getattr__`` of a package: each of its ``files`` comes when it is asked for."""

    def found(name: str) -> ModuleType:
        if name not in files:
            raise AttributeError(f"module {folder!r} has no attribute {name!r}")
        return import_module(f"{folder}.{name}")

    return found
