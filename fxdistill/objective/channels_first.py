"""Values ``[B, C, L]`` of 1-D convolutions, which losses take as tokens ``[B, L, C]``."""

from collections.abc import Sequence

from torch import Tensor, nn

from fxdistill.base.figures import shown
from fxdistill.errors import LayoutError
from fxdistill.mapping.layout import Layout
from fxdistill.mapping.match import Match
from fxdistill.mapping.resolve import tap_of
from fxdistill.models.axes import channel_axis
from fxdistill.models.tap import Tap
from fxdistill.models.weights import is_channels_first
from fxdistill.objective.term import Term

Known = Sequence[bool | None]
AXES = 3


def token_axis(model: nn.Module, tap: Tap) -> int:
    """The token axis of a value: a 1-D convolution returns ``[B, C, L]``, with tokens last."""
    return 2 if _is_first(model, tap) else 1


def _is_first(model: nn.Module, tap: Tap) -> bool | None:
    """Whether a value of three axes is ``[B, C, L]``; ``None`` where its module does not tell."""
    if tap.reads is not None or tap.port not in ("output", "input"):
        return None
    if is_channels_first(model.get_submodule(tap.path)):
        return True
    return False if is_last(model, tap) else None


def known_first(
    match: Match, models: tuple[nn.Module, nn.Module], both: tuple[Layout, Layout], named: bool
) -> tuple[bool | None, bool | None]:
    """Whether both values are ``[B, C, L]``, unless the match says what their axes are.

    A loss of the user's own gets its values as they are.
    """
    if not named or match.tokens not in ("auto", None):
        return None, None
    taps = tap_of(match, "student"), tap_of(match, "teacher")
    s, t = (
        None if layout else _is_first(model, tap)
        for model, tap, layout in zip(models, taps, both, strict=True)
    )
    own = isinstance(match.project, nn.Module) and not isinstance(match.project, nn.Conv1d)
    return None if own else s, t


def is_last(model: nn.Module, tap: Tap) -> bool:
    """Whether a value's last axis is its width: a layer that acts on that axis returns it."""
    return channel_axis(model, tap) == -1


def are_first(known: Known, student: Sequence[int], teacher: Sequence[int]) -> tuple[bool, bool]:
    """Whether each of two shapes is ``[B, C, L]``.

    One whose module does not tell (``None``) is like the other, if it has as many places on its
    last axis. Raises LayoutError where its two last axes are alike, so that either may be.
    """
    shapes = (student, teacher)
    s, t = (
        first if len(shape) == AXES else False for first, shape in zip(known, shapes, strict=True)
    )
    if (s, t) not in ((True, None), (None, True)):
        return s is True, t is True
    (_, _, places), other = shapes if s else shapes[::-1]
    if places != other[2]:
        return s is True, t is True
    if places == other[1]:
        ours, theirs = ("student", "teacher") if s else ("teacher", "student")
        raise LayoutError(
            f"the {ours}'s value {shown(shapes[not s])} is [B, C, L], and nothing tells which axis "
            f"of the {theirs}'s {shown(other)} is L: Match(rearrange='b c l -> b l c') brings the "
            "channels of both to the last axis, and a pair does so with one of them"
        )
    return True, True


def tokens_first(shape: Sequence[int], first: bool) -> Sequence[int]:
    """The shape ``[B, L, C]`` of a value that is ``[B, C, L]``."""
    return (shape[0], shape[2], shape[1]) if first else shape


def as_tokens(term: Term, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both values with the channels of those that are ``[B, C, L]`` on the last axis."""
    first = are_first(term.channels_first, student.shape, teacher.shape)
    s, t = (
        x.transpose(1, 2) if is_so else x
        for x, is_so in zip((student, teacher), first, strict=True)
    )
    return s, t
