"""Group the losses on logits by the student whose logits they read."""

from torch import fx

from fxdistill.heads.curve import Unreadable
from fxdistill.heads.read_head import is_cut, value_of
from fxdistill.heads.read_total import Summand


def by_student(summands: tuple[Summand, ...]) -> list[list[Summand]]:
    """Group summands by the student logits that they read, with or without padding columns."""
    groups: dict[fx.Node, list[Summand]] = {}
    for summand in summands:
        require_constants(summand)
        logits = summand.argument(0)
        source = logits.args[0] if logits.args else None
        if isinstance(source, fx.Node) and is_cut(logits, source):
            logits = source
        groups.setdefault(logits, []).append(summand)
    return list(groups.values())


def require_constants(summand: Summand) -> None:
    """Raise Unreadable if weights or temperature need a gradient, which ``vocab_loss`` lacks."""
    for name in ("weights", "temperature"):
        node = summand.option(name)
        if isinstance(node, fx.Node) and value_of(node).requires_grad:
            raise Unreadable(f"the {name} of a loss on them learns")
