"""Taking values out of running models without touching them."""

from fxdistill.base.later import later

__getattr__ = later(__name__, "placed_behind")
