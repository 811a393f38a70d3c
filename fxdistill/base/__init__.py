"""Helpers that every other folder uses: tensors, ranks, nodes, figures, files, text, warnings."""

from fxdistill.base.later import later

__getattr__ = later(__name__, "placement")
