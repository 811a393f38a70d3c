"""Models on a mesh, and nothing else: losses on a mesh are in ``losses``."""

from fxdistill.base.later import later

__getattr__ = later(
    __name__,
    "agree",
    "checkpoints",
    "fsdp2",
    "gradients",
    "named",
    "recompute",
    "setup",
    "sharding",
    "wrappers",
)
