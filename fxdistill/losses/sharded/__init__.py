"""The losses for DTensors, computed by their placements."""

from fxdistill.base.later import later

__getattr__ = later(__name__, "hidden", "logits", "scores")
