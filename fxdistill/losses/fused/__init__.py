"""The vocabulary head and its losses in one operator, one chunk of tokens at a time."""

from fxdistill.base.later import later

__getattr__ = later(
    __name__, "sharded_body", "sharded_heads", "sharded_score_heads", "sharded_scores"
)
