"""The joint program: models and objective in one graph."""

from fxdistill.graph.listing import listing
from fxdistill.graph.program import Program


class JointProgram(Program):
    """Models and objective in one graph. The first output is the total loss."""

    def __str__(self) -> str:
        """One line for each call of a module or a loss: what it returns, FLOPs and bytes."""
        return listing(self)
