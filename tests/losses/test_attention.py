"""Losses of attention against loops over maps, and what blocks of queries must not change."""

import itertools
import math
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fxdistill import errors, losses
from fxdistill.losses import Attention, attention_blocks

F64 = torch.float64
BATCH, LENGTH = 2, 6
LOSSES = ("attention_kl", "attention_mse", "scores", "transfer_matrix")


@pytest.fixture(params=[1, 2**17], ids=["rows", "whole"], autouse=True)
def block(request, monkeypatch):
    """Every test with blocks of one query, and with one block of all queries."""
    monkeypatch.setattr(attention_blocks, "BLOCK", request.param)


def side(heads, width=5, few=None, queries=LENGTH, keys=LENGTH, dtype=F64, **rest) -> Attention:
    sizes = (heads, queries), (few or heads, keys), (few or heads, keys)
    made = (torch.randn(BATCH, h, n, width, dtype=dtype, requires_grad=True) for h, n in sizes)
    return Attention(*made, **rest)


def scores_and_keys(x: Attention) -> tuple[Tensor, Tensor]:
    """The scores, and the keys that each query attends, formed as a whole."""
    key = x.key.repeat_interleave(x.query.shape[1] // x.key.shape[1], 1)
    scale = x.query.shape[-1] ** -0.5 if x.scale is None else x.scale
    scores = torch.einsum("bhqd,bhkd->bhqk", x.query, key) * scale
    kept = torch.ones_like(scores, dtype=torch.bool)
    if x.mask is not None and x.mask.dtype == torch.bool:
        kept = kept & x.mask
    elif x.mask is not None:
        kept = kept & (x.mask > -1e30)
        scores = scores + torch.where(x.mask > -1e30, x.mask, 0)
    return scores, kept.tril() if x.causal else kept


def explicit(x: Attention) -> Tensor:
    """The map; rows of queries that attend nothing are 0."""
    scores, kept = scores_and_keys(x)
    unnormalised = torch.where(kept, (scores - scores.amax(-1, keepdim=True).detach()).exp(), 0)
    total = unnormalised.sum(-1, keepdim=True)
    return unnormalised / torch.where(total == 0, 1, total)


def row(name: str, s: Tensor, t: Tensor, s_kept: Tensor, t_kept: Tensor) -> Tensor:
    """One query's value, from its rows of maps or scores."""
    both, either = s_kept & t_kept, s_kept | t_kept
    if name == "attention_kl":
        return sum(t[k] * (t[k] / s[k]).log() for k in range(len(s)) if both[k])
    if name == "transfer_matrix":
        return (s - t).square().sum()
    keys = both if name == "scores" else either
    return (s[keys] - t[keys]).square().mean()


def oracle(name, student: Attention, teacher: Attention, w: Tensor, heads=None) -> Tensor:
    sides = []
    for x in (student, teacher):
        scores, kept = scores_and_keys(x)
        sides.append((scores if name == "scores" else explicit(x), kept))
    (s, s_kept), (t, t_kept) = sides
    if heads is None and s.shape[1] == t.shape[1]:
        heads = [(h, h) for h in range(s.shape[1])]
    if heads is None or heads == "mean":
        s, t = s.mean(1, keepdim=True), t.mean(1, keepdim=True)
        s_kept, t_kept = s_kept[:, :1], t_kept[:, :1]  # the masks of these tests are of all heads
        heads = [(0, 0)]
    found, total = torch.zeros((), dtype=F64), 0.0
    for b, (i, j) in itertools.product(range(len(s)), heads):
        each, weights = [], []
        for q in range(s.shape[2]):
            rows = (s[b, i, q], t[b, j, q], s_kept[b, i, q], t_kept[b, j, q])
            counts = rows[2].any() and rows[3].any()
            counts = (rows[2] & rows[3]).any() if name == "scores" else counts
            if w[b, q] != 0 and counts:
                each.append(row(name, *rows))
                weights.append(float(w[b, q]))
        if name == "transfer_matrix" and each:
            mean = sum(weights) / len(weights)
            norm = sum(a * b for a, b in zip(each, weights, strict=True)) / mean
            each, weights = [norm.sqrt() / len(weights)], [mean]
        found = found + sum(a * b for a, b in zip(each, weights, strict=True))
        total += sum(weights)
    return found / total if total else found


def value(name, student, teacher, weights=None, **options) -> Tensor:
    if name == "scores":
        return losses.attention_mse(student, teacher, weights, scores=True, **options)
    return getattr(losses, name)(student, teacher, weights, **options)


def close(found: Tensor, want: Tensor, *of: Tensor) -> None:
    torch.testing.assert_close(found, want)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    ours, theirs = (torch.autograd.grad(x, of, **options) for x in (found, want))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def learnt(*sides: Attention) -> list[Tensor]:
    taken = [x for a in sides for x in (a.query, a.key, a.mask)]
    return [x for x in taken if isinstance(x, Tensor) and x.requires_grad]


def masks() -> dict[str, Tensor | None]:
    left = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    left[0, ..., :2] = False
    window = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(-1)
    bias, of_heads = (torch.randn(1, n, LENGTH, LENGTH, dtype=F64) for n in (1, 4))
    return {
        "none": None,
        "padded": left,
        "padded floats": torch.where(left, 0.0, torch.finfo(torch.float32).min),
        "window": window,
        "bias": torch.where(window & left, bias, torch.finfo(F64).min),
        "infinite": torch.where(left, bias, -torch.inf),
        "learnt": torch.randn(LENGTH, dtype=F64, requires_grad=True),
        "learnt by heads": torch.where(left, of_heads, -torch.inf).requires_grad_(),
    }


WEIGHTS = torch.tensor([[1.0, 0.5, 2.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", list(masks()))
def test_blocks_have_the_value_and_gradients_of_maps(name, causal, mask):
    student = side(4, 5, few=2, mask=masks()[mask], causal=causal, scale=0.7)
    teacher = side(4, 3, mask=masks()["padded"], causal=causal)
    found, want = (f(name, student, teacher, WEIGHTS) for f in (value, oracle))
    close(found, want, *learnt(student, teacher))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("counts", "heads"),
    [
        ((4, 4), None),
        ((4, 2), None),
        ((4, 4), "mean"),
        ((4, 2), [(3, 0), (0, 1), (3, 1)]),
        ((2, 4), ((1, 3),)),
    ],
)
def test_heads_are_compared_one_by_one_as_a_mean_or_as_pairs(name, counts, heads):
    student, teacher = (side(n, few=2, causal=True) for n in counts)
    found = value(name, student, teacher, WEIGHTS, heads=heads)
    close(found, oracle(name, student, teacher, WEIGHTS, heads), *learnt(student, teacher))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("heads", [None, "mean"])
def test_maps_that_exist_have_the_same_loss(name, heads):
    """Both maps given, or one of them; a given map is 0 where a key is masked."""
    student, teacher = side(4, mask=masks()["padded"]), side(4, 3, causal=True)
    want = oracle(name, student, teacher, WEIGHTS, heads)
    if name == "scores":
        found = map(scores_and_keys, (student, teacher))
        pairs = [tuple(torch.where(kept, scores, -torch.inf) for scores, kept in found)]
    else:
        maps = explicit(student), explicit(teacher)
        pairs = [maps, (student, maps[1]), (maps[0], teacher)]
    for s, t in pairs:
        close(value(name, s, t, WEIGHTS, heads=heads), want, *learnt(student, teacher))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    student, teacher = side(2, 3, few=1, causal=True), side(2, 2)

    def loss(q, k, tq, tk):
        return value(name, student._replace(query=q, key=k), Attention(tq, tk, tk), WEIGHTS)

    assert torch.autograd.gradcheck(loss, learnt(student, teacher))


@pytest.mark.parametrize("name", LOSSES)
def test_equal_attention_has_loss_0(name):
    student = side(4, causal=True)
    teacher = Attention(*(x.detach() for x in student[:3]), causal=True)
    for heads in (None, "mean", [(1, 1)]):
        found = value(name, student, teacher, heads=heads)
        torch.testing.assert_close(found, torch.zeros((), dtype=F64), rtol=0, atol=1e-14)
        found.backward()
        assert student.query.grad.abs().max() < 1e-7


def test_the_divergence_is_over_the_teachers_keys_and_nothing_is_renormalised():
    """Where masks differ: one query, three keys, by hand."""
    zeros, half, third = torch.zeros(1, 1, 1, 3, dtype=F64), math.log(2), math.log(3)
    one = Attention(zeros[..., :1], zeros.mT[..., :1], zeros.mT[..., :1])
    some = one._replace(mask=torch.tensor([True, True, False]))
    maps = {False: torch.full_like(zeros, 1 / 3), True: torch.tensor([[[[0.5, 0.5, 0.0]]]])}
    # The student has the third key as well: its map is 1/3, and the sum is over two keys.
    for s, t in ((one, some), (maps[False], maps[True].double())):
        torch.testing.assert_close(losses.attention_kl(s, t), zeros.sum() + third - half)
    # The student's mask hides the teacher's third key, which has no part: 2 · 1/3 · log(1/3 · 2).
    for s, t in ((some, one), (maps[True].double(), maps[False])):
        want = zeros.sum() + 2 / 3 * (half - third)
        torch.testing.assert_close(losses.attention_kl(s, t), want)


@pytest.mark.parametrize("name", LOSSES)
def test_what_does_not_count_changes_nothing(name):
    """Padding on the right: more queries of weight 0, and more keys that are masked."""
    student, teacher = side(2), side(2, 3)
    want = value(name, student, teacher)
    kept = torch.arange(LENGTH + 3) < LENGTH
    longer = [
        Attention(*(torch.cat([x, torch.randn_like(x[:, :, :3])], 2) for x in one[:3]), kept)
        for one in (student, teacher)
    ]
    w = kept.float().expand(BATCH, -1)
    close(value(name, *longer, w), want, *learnt(student, teacher))


@pytest.mark.parametrize("name", LOSSES)
def test_where_nothing_counts_the_value_is_0_without_gradients(name):
    student, teacher = side(2), side(2)
    nothing = torch.zeros(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    for found in (
        value(name, student, teacher, torch.zeros(BATCH, LENGTH)),
        value(name, student._replace(mask=nothing), teacher),
        value(name, student, teacher._replace(mask=nothing.double() + torch.finfo(F64).min)),
        value(name, *(x._replace(mask=~nothing & nothing) for x in (student, teacher))),
    ):
        gradients = torch.autograd.grad(found, learnt(student, teacher))
        assert float(found.detach()) == 0
        assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [1e3, 1e18])
def test_extreme_scores_are_finite(name, size):
    student, teacher = side(2, dtype=torch.float32), side(2, dtype=torch.float32)
    student = student._replace(query=(student.query * size).detach().requires_grad_())
    found = value(name, student, teacher)
    gradients = torch.autograd.grad(found, learnt(student, teacher))
    assert all(x.isfinite().all() for x in (found, *gradients))


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_widened(name):
    student, teacher = side(2, 8, causal=True), side(2, 8)
    half = [
        Attention(*(x.detach().bfloat16().requires_grad_() for x in one[:3]), causal=one.causal)
        for one in (student, teacher)
    ]
    same = [Attention(*(x.double() for x in one[:3]), causal=one.causal) for one in half]
    found = value(name, *half)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), oracle(name, *same, torch.ones(BATCH, LENGTH)))
    assert torch.autograd.grad(found, half[0].query)[0].dtype == torch.bfloat16


def test_weights_of_samples_weigh_all_of_their_queries():
    student, teacher = side(2), side(2)
    w = torch.tensor([2.0, 0.5])
    for name in LOSSES:
        found = value(name, student, teacher, w)
        want = oracle(name, student, teacher, w[:, None].expand(-1, LENGTH))
        close(found, want, *learnt(student, teacher))


def test_a_transfer_matrix_is_any_matrix():
    s, t = (torch.randn(BATCH, 3, LENGTH, LENGTH, dtype=F64) for _ in range(2))
    s[0, 0, 1], t[1, 2] = 0, 0
    want = (s - t).flatten(2).norm(dim=-1).mean() / LENGTH
    torch.testing.assert_close(losses.transfer_matrix(s, t), want)


def test_attention_of_queries_to_other_keys():
    student, teacher = side(2, queries=3, keys=7), side(2, queries=3, keys=7)
    for name in LOSSES:
        w = torch.tensor([[1.0, 1.0, 0.0], [1.0, 2.0, 1.0]])
        close(
            value(name, student, teacher, w),
            oracle(name, student, teacher, w),
            *learnt(student, teacher),
        )


def test_blocks_form_no_map_and_keep_none():
    """The largest sum of live tensors, at 2048 tokens: below an eighth of the two maps."""
    if attention_blocks.BLOCK == 1:
        pytest.skip("the size of blocks is the library's")
    heads, length = 8, 2048
    always, no, scale = torch.ones(1, 1, 1, 1).bool(), torch.tensor(True), torch.tensor(0.3)
    given = [*(torch.randn(1, heads, length, 8) for _ in range(2)), always] * 2
    rest = (no, scale, no, scale, torch.ones(1, length))
    pairs = [i for h in range(heads) for i in (h, h)]
    largest = {}
    for kind in ("kl", "frobenius"):
        with Live() as live:
            attention_blocks._blocks._init_fn(*given, *rest, kind, pairs, "qk")
        largest[kind] = live.most
    maps = 2 * heads * length**2 * 4
    assert max(largest.values()) < maps / 8, largest


@pytest.mark.parametrize("kind", ["kl", "maps", "scores", "frobenius"])
@pytest.mark.parametrize("needs", ["", "qk", "qkQK"])
def test_flops_are_those_of_its_products(kind, needs):
    student, teacher = side(4, few=2), side(2, 3)
    rest = (torch.tensor(True), torch.tensor(0.3), torch.tensor(False), torch.tensor(0.3))
    mask = torch.ones(1, 1, 1, 1).bool()
    given = (*student[:2], mask, *teacher[:2], mask, *rest, WEIGHTS, kind, [], needs)
    with FlopCounterMode(display=False) as counter:
        attention_blocks._blocks._init_fn(*(x.detach() if torch.is_tensor(x) else x for x in given))
    assert attention_blocks.block_flops(*given) == counter.get_total_flops()


class Live(TorchDispatchMode):
    """The bytes of all tensors that operators made and that are alive, at most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.seen:
                storage = x.untyped_storage()
                self.seen[storage._cdata] = storage
                self.now += (size := storage.nbytes())
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.free, size)
        return out

    def free(self, size):
        self.now -= size


# ---- relations


def relations(x: Tensor, heads: int, kept: Tensor) -> Tensor:
    """softmax(h hᵀ/√d) over the keys that are kept, a head at a time."""
    each = []
    for h in x.chunk(heads, -1):
        scores = h @ h.transpose(1, 2) / h.shape[-1] ** 0.5
        each.append(scores.masked_fill(~kept, -torch.inf).softmax(-1))
    return torch.stack(each, 1)


@pytest.mark.parametrize("of", ["q", "k", "v"])
@pytest.mark.parametrize("heads", [None, 1, 6])
def test_relations_are_cut_anew(of, heads):
    student, teacher = side(2, 6, few=1), side(3, 4)
    kept = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    kept[1, ..., 4:] = False
    bias = torch.where(kept, torch.randn(1, 1, LENGTH, LENGTH, dtype=F64), -torch.inf)
    found = losses.relation_kl(
        student._replace(mask=bias), teacher._replace(mask=kept), WEIGHTS, heads=heads, of=of
    )
    maps = []
    for one in (student, teacher):
        x = {"q": one.query, "k": one.key, "v": one.value}[of]
        count = one.query.shape[1]
        joined = torch.cat([x[:, h * x.shape[1] // count] for h in range(count)], -1)
        maps.append(relations(joined, heads or 2, kept[:, 0]))
    s, t = maps
    each = torch.where(t > 0, t * (t.clamp(min=1e-300) / s.clamp(min=1e-300)).log(), 0).sum(-1)
    want = (each.mean(1) * WEIGHTS).sum() / WEIGHTS.sum()
    close(found, want, *(x for one in (student, teacher) for x in one[:3]))


def test_relations_of_hidden_states_leave_out_what_does_not_count():
    s = torch.randn(BATCH, LENGTH, 6, dtype=F64, requires_grad=True)
    t = torch.randn(BATCH, LENGTH, 8, dtype=F64)
    w = torch.ones(BATCH, LENGTH)
    w[0, 3:] = 0
    found = losses.relation_kl(s, t, w, heads=2)
    per_sample = [losses.relation_kl(s[:1, :3], t[:1, :3], heads=2)]
    per_sample.append(losses.relation_kl(s[1:], t[1:], heads=2))
    close(found, (3 * per_sample[0] + LENGTH * per_sample[1]) / (3 + LENGTH), s)


# ---- what does not fit


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda s, t: losses.attention_kl(s, side(2, keys=3)), errors.ShapeError, "keys 6 and 3"),
        (lambda s, t: losses.attention_kl(s.query[0], t), errors.ShapeError, "map of attention"),
        (lambda s, t: losses.attention_kl(s, t, heads=[(0, 2)]), errors.OptionError, "of 2"),
        (lambda s, t: losses.attention_kl(s, t, heads="each"), errors.OptionError, "'mean'"),
        (lambda s, t: losses.attention_kl(s, t, heads=[]), errors.OptionError, "list of pairs"),
        (lambda s, t: losses.attention_kl(s, t, torch.ones(3, 3)), errors.ShapeError, r"\[B, Q\]"),
        (
            lambda s, t: losses.attention_mse(s, explicit(t), scores=True),
            errors.OptionError,
            "a map, which has none",
        ),
        (lambda s, t: losses.relation_kl(s, t, heads=3), errors.ShapeError, "do not divide"),
        (lambda s, t: losses.relation_kl(s, t, of="o"), errors.OptionError, "'q', 'k' or 'v'"),
        (
            lambda s, t: losses.relation_kl(s.query[:, 0], t.query[:, 0]),
            errors.OptionError,
            "needs heads=",
        ),
        (
            lambda s, t: losses.relation_kl(side(2, keys=3), t),
            errors.ShapeError,
            "use attention_kl",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(call, error, says):
    with pytest.raises(error, match=says):
        call(side(2), side(2))


def test_there_is_no_second_derivative():
    student, teacher = side(2), side(2)
    found = losses.attention_kl(student, teacher)
    with pytest.raises(errors.StepError, match="no derivative"):
        torch.autograd.grad(found, student.query, create_graph=True)
