"""What every other folder stands on: tensors, ranks, graph nodes, figures, files, text."""

from fxdistill.base.later import later

__getattr__ = later(__name__, "placement")
