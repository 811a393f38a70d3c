"""Layouts against plain slicing, permuting and averaging."""

import pytest
import torch
from torch import Tensor

from fxdistill.errors import LayoutError, OptionError
from fxdistill.mapping.layout import keeps_tokens, layouts, parse, pools_tokens, width_after
from fxdistill.objective.arrange import arrange, arranged_shape

TOKENS = torch.arange(2 * 17 * 6.0).view(2, 17, 6)
MAP = torch.arange(2 * 5 * 2 * 8.0).view(2, 5, 2, 8)


def one(pattern: str, reduction: str = "") -> tuple[tuple[str, str], ...]:
    return ((pattern, reduction),)


def arranged(pattern: str, reduction: str = "", value: Tensor = TOKENS) -> Tensor:
    return arrange(value, one(pattern, reduction), MAP, one("b c h w -> b c h w"))


@pytest.mark.parametrize(
    ("pattern", "reduction", "wanted"),
    [
        ("b (1 + n) d -> b n d", "", TOKENS[:, 1:]),
        ("b (n + 2) d -> b n d", "", TOKENS[:, :-2]),
        ("b (1 + n + 4) d -> b n d", "", TOKENS[:, 1:-4]),
        ("... (1 + n) d -> ... n d", "", TOKENS[:, 1:]),
        ("b (3 + n) ... -> b n ...", "", TOKENS[:, 3:]),
        ("b l d -> (b l) d", "", TOKENS.reshape(34, 6)),
        ("b l (k 2) -> b l k", "max", TOKENS.view(2, 17, 3, 2).amax(-1)),
        ("b l d -> b d", "mean", TOKENS.mean(1)),
        ("b l d -> b 1 d", "sum", TOKENS.sum(1, keepdim=True)),
        # 2 × 8 is known from the map by name: 4 × 4 would be as possible from the tokens alone.
        ("b (1 + h w) d -> b d h w", "", TOKENS[:, 1:].view(2, 2, 8, 6).permute(0, 3, 1, 2)),
        ("b (1 + 4 4) d -> b d", "mean", TOKENS[:, 1:].mean(1)),
        ("b (1 + 2 k) d -> b k d", "mean", TOKENS[:, 1:].view(2, 2, 8, 6).mean(1)),
    ],
)
def test_patterns_do_what_they_say(pattern: str, reduction: str, wanted: Tensor) -> None:
    torch.testing.assert_close(arranged(pattern, reduction), wanted)
    shape = arranged_shape(TOKENS, one(pattern, reduction), MAP, one("b c h w -> b c h w"))
    assert shape == tuple(wanted.shape)


def test_rearrange_comes_before_reduce() -> None:
    both, none = layouts(("b (1 + n) d -> b n d", None), (("b n d -> b d", "mean"), None), "x")
    assert none == ()
    torch.testing.assert_close(arrange(TOKENS, both, MAP, none), TOKENS[:, 1:].mean(1))


def test_one_layout_is_for_both_sides_and_a_pair_for_each() -> None:
    assert layouts("a b -> b a", None, "x") == ((("a b -> b a", ""),),) * 2
    assert layouts(None, ("a b -> a", "max"), "x") == ((("a b -> a", "max"),),) * 2
    assert layouts(None, (None, ("a b -> a", "max")), "x") == ((), (("a b -> a", "max"),))


@pytest.mark.parametrize(
    ("pattern", "reduction", "words"),
    [
        ("b l d", "", "no einops pattern"),
        ("b l d -> b l q", "", "q on the right is not on the left"),
        ("b l d -> b l", "", r"loses the axis d.*reduce="),
        ("b (4 d) -> b d", "", "loses the axis 4"),
        ("b d -> b 4 d", "", "only 1 can stand"),
        ("b l l -> b l", "", "names l twice"),
        ("b (l d -> b l d", "", "not closed"),
        ("b () d -> b d", "", "holds nothing"),
        ("b (n + m) d -> b n d", "", "all but one term are numbers"),
        ("b n -> b (1 + n)", "", "only stand on the left"),
        ("b n; d -> b n d", "", "unexpected ';' on the left"),
        ("b l d -> (b l d", "", "not closed"),
        ("b l d -> b l d ]", "", "unexpected ']' on the right"),
        ("b l d -> b b l d", "", "names b twice on the right"),
        ("b l d -> b ... l d", "", "stands on both sides or on none"),
        ("b l d -> (b (l d))", "", r"unexpected '\(' on the right"),
        ("b _l d -> b _l d", "", "_l begins or ends with _"),
    ],
)
def test_what_is_no_pattern_is_said_in_words(pattern: str, reduction: str, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        parse(pattern, reduction)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("b c h w -> b (h w) c", r"describes 4 axes, but the value has 3: \[2, 17, 6\]"),
        ("b (1 + x y) d -> b d x y", r"axis 1 of \[2, 17, 6\] is 16 = x × y, and nothing says"),
        ("b (17 + n) d -> b n d", "none is left"),
        ("b (k 5) d -> (b 1) k d", "loses the axis 5"),
        ("b (1 + h v) d -> b d h v", None),  # 16 = 2 × v: known, since h is the map's
    ],
)
def test_what_does_not_fit_is_said_in_words(pattern: str, words: str | None) -> None:
    if words is None:
        assert arranged(pattern).shape == (2, 6, 2, 8)
    else:
        with pytest.raises(LayoutError, match=words):
            arranged(pattern)


def test_sizes_that_do_not_divide_are_named() -> None:
    with pytest.raises(LayoutError, match=r"has 17 entries, which is not h × q with h = 2"):
        arranged("b (h q) d -> b h q d")
    other = torch.zeros(2, 5, 3, 8)
    with pytest.raises(LayoutError, match=r"16 entries, which is not h × w with h = 3, w = 8"):
        arrange(TOKENS, one("b (1 + h w) d -> b d h w"), other, one("b c h w -> b c h w"))


@pytest.mark.parametrize("bad", [("b n", "avg"), ("b n -> b", "avg"), "mean", 3, ("a", "b", "c")])
def test_reductions_that_are_none(bad: object) -> None:
    with pytest.raises((OptionError, LayoutError)):
        layouts(None, bad, "x")


WEIGHTS = torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.0, 0.0]])


@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
def test_pooling_counts_tokens_by_their_weights(reduction: str) -> None:
    value = torch.randn(2, 3, 4, dtype=torch.float64)
    value[0, 2] = float("nan")  # padding may hold anything
    value.requires_grad_()
    pooled = arrange(value, one("b l d -> b d", reduction), value, (), WEIGHTS.double())
    first, second = value[0, :2].detach(), value[1, 0].detach()
    wanted = {
        "mean": torch.stack([first.mean(0), second]),
        "sum": torch.stack([first.sum(0), 0.5 * second]),
        "max": torch.stack([first.amax(0), second]),
    }[reduction]
    torch.testing.assert_close(pooled, wanted)
    (gradient,) = torch.autograd.grad(pooled.sum(), value)
    assert gradient[0, 2].count_nonzero() == 0
    assert gradient[1, 1:].count_nonzero() == 0
    slope = {"mean": (0.5, 1.0), "sum": (1.0, 0.5)}.get(reduction)
    if slope is not None:
        assert (gradient[0, :2] == slope[0]).all()
        assert (gradient[1, 0] == slope[1]).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
def test_pooling_follows_the_tokens_through_what_comes_before(reduction: str) -> None:
    value = torch.randn(2, 3, 4)
    turned = (("b l d -> b d l", ""), ("b d l -> b d", reduction))
    got = arrange(value, turned, value, (), WEIGHTS)
    torch.testing.assert_close(
        got, arrange(value, one("b l d -> b d", reduction), value, (), WEIGHTS)
    )
    # Another axis that is reduced is not the tokens': nothing is weighed there.
    heads = one("b l (h d) -> b l d", reduction)
    plain = arrange(value, (("b l (h 2) -> b l h", reduction),), value, ())
    weighed = arrange(value, (("b l (h 2) -> b l h", reduction),), value, (), WEIGHTS)
    torch.testing.assert_close(weighed, plain)
    assert not pools_tokens(heads)


def test_pooling_where_nothing_counts_is_zero_with_zero_gradients() -> None:
    value = torch.randn(2, 3, 4, requires_grad=True)
    for reduction in ("mean", "sum", "max"):
        weights = torch.zeros(2, 3)
        pooled = arrange(value, one("b l d -> b d", reduction), value, (), weights)
        assert pooled.count_nonzero() == 0
        (gradient,) = torch.autograd.grad(pooled.sum(), value)
        assert gradient.count_nonzero() == 0


@pytest.mark.parametrize(
    ("pattern", "reduction", "keeps", "pools"),
    [
        ("b l d -> b l d", "", True, False),
        ("b l d -> (b l) d", "", True, False),
        ("b l (h d) -> b l h", "mean", True, False),
        ("b l d -> b d l", "", False, False),
        ("b (1 + n) d -> b n d", "", False, False),
        ("b l d -> b d", "mean", False, True),
        ("b l d -> b 1 d", "max", False, True),
        ("b l h w -> b l", "mean", True, False),
        ("... d -> d ...", "", False, False),
    ],
)
def test_what_becomes_of_tokens(pattern: str, reduction: str, keeps: bool, pools: bool) -> None:
    assert keeps_tokens(one(pattern, reduction)) is keeps
    if pattern.startswith("b l"):
        assert pools_tokens(one(pattern, reduction)) is pools


@pytest.mark.parametrize(
    ("pattern", "places", "wanted"),
    [
        ("b c h w -> b (h w) c", 2, (7, 0)),
        ("b c h w -> b c", 2, (7, 0)),
        ("b c l -> b l c", 1, (7, 0)),
        ("b c t h w -> b c h w", 3, (7, 2)),
        ("b (1 + h w) c -> b c h w", 0, (7, 2)),
        ("b n c -> b c", 0, (7, 0)),
        ("b n (h c) -> b n h c", 0, None),
        ("b n c -> b c n", 0, None),
    ],
)
def test_where_the_width_goes(pattern: str, places: int, wanted: tuple[int, int] | None) -> None:
    assert width_after(one(pattern, "mean"), 7, places) == wanted
