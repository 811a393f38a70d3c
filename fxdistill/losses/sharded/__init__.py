"""The losses of DTensors, chosen from their placements."""

from fxdistill.base.later import later

__getattr__ = later(__name__, "hidden", "logits")
