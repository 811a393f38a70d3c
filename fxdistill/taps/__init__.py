"""Read values out of running models without changing the models."""

from fxdistill.base.later import later

__getattr__ = later(__name__, "placed_behind")
