"""Helpers that every other folder uses: tensors, ranks, graph nodes, figures, files, text."""

from fxdistill.base.later import later

__getattr__ = later(__name__, "placement")
