"""One term of the objective."""

from dataclasses import dataclass

from fxdistill.losses.names import Loss
from fxdistill.mapping.layout import Layout
from fxdistill.models.conventions import Stream
from fxdistill.models.tap import Tap

LOGITS = Tap("", "logits")
GLOBAL_SETTINGS = ("logit_weight", "feature_weight", "label_weight", "temperature")


@dataclass(frozen=True)
class Term:
    """One match: ``loss(student value, teacher value, weights)``, times ``weight``."""

    name: str
    loss: Loss
    student: Tap
    teacher: Tap
    weight: float = 1.0
    stream: Stream = "tokens"
    projection: int | None = None
    layouts: tuple[Layout, Layout] = ((), ())
    # What the layouts do to tokens, told here so that no pattern is read while the step is traced.
    keeps_tokens: bool = True
    pools_tokens: tuple[bool, bool] = (False, False)

    @property
    def taps(self) -> tuple[tuple[str, Tap], tuple[str, Tap]]:
        """What the term reads, by tower."""
        return ("student", self.student), ("teacher", self.teacher)
