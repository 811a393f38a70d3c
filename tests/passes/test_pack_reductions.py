"""PackReductions: which all-reduces become one, what moves, and that no number changes."""

import random
from unittest import mock

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import fxdistill
from fxdistill.compiler import lower
from fxdistill.passes import PackReductions
from mesh_steps import AOT, compare, step
from placed_models import LM, parallel
from processes import run
from summed import REDUCE, WAIT, Writer, aten, reductions, sizes, values


def packed(program):
    """The program after the pass, which must change no value and leave nothing more to do."""
    after = fxdistill.run(program, (PackReductions(),))
    for found, wanted in zip(values(after), values(program), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert after.outputs == program.outputs
    assert PackReductions()(after) is after
    return after


def test_a_graph_with_fewer_than_two_is_returned_as_it_is():
    w = Writer()
    a = w.input("a")
    one = w.program(w.summed(a), w.call(aten.mul.Tensor, a, 2.0))
    assert PackReductions()(one) is one
    assert fxdistill.run(one, (PackReductions(),)).history[-1].changed is False


def test_sums_of_scalars_become_one():
    w = Writer()
    inputs = [w.input(f"x{i}") for i in range(5)]
    terms = [w.summed(w.call(aten.mul.Tensor, x, float(i))) for i, x in enumerate(inputs)]
    total = w.call(aten.sum.default, w.call(aten.stack.default, terms))
    before = w.program(total, *terms)
    text = str(before)
    after = packed(before)
    assert sizes(after) == [5]
    assert str(before) == text
    assert after.history[-1].remarks == after.remarks == ("5 sums over ranks in one",)


def test_terms_that_are_returned_share_no_memory():
    w = Writer()
    after = packed(w.program(*[w.summed(w.input(f"x{i}")) for i in range(3)]))
    assert len({value.untyped_storage().data_ptr() for value in values(after)}) == 3


def test_metadata():
    w = Writer()
    a, b = w.input("a"), w.input("b")
    first = w.summed(a, custom={"fxdistill": "student"}, seq_nr=1, partitioner_tag="is_forward")
    last = w.summed(b, custom={"fxdistill": "objective"}, seq_nr=2, partitioner_tag="is_forward")
    after = packed(w.program(first, last))
    made = {n.target: n for n in after.gm.graph.nodes if n.op == "call_function"}
    for target in (aten.cat.default, REDUCE, WAIT):
        assert made[target].meta["val"].shape == (2,)
        assert made[target].meta["custom"] == {"fxdistill": "objective"}
        assert made[target].meta["partitioner_tag"] == "is_forward"
    for value, seq_nr, section in zip(
        after.gm.graph.output_node().args[0], (1, 2), ("student", "objective"), strict=True
    ):
        assert value.meta["val"].shape == ()
        assert value.meta["seq_nr"] == seq_nr
        assert value.meta["custom"] == {"fxdistill": section}


@pytest.mark.parametrize(
    "what",
    ["group", "operation", "type", "direction", "trace", "dimensions", "unwaited", "read early"],
)
def test_unlike_ones_are_not_packed(what):
    w = Writer()
    a = w.input("primals_1")
    double = torch.float64 if what == "type" else torch.float32
    name = "tangents_1" if what == "direction" else "primals_2"
    b = w.input(name, (1,) if what == "dimensions" else (), double)
    first = w.summed(a)
    if what in ("unwaited", "read early"):
        second = w.call(REDUCE, b, "sum", "0")
        if what == "read early":
            w.call(WAIT, second)
            second = w.call(aten.mul.Tensor, second, 2.0)
    else:
        meta = {"partitioner_tag": "is_backward"} if what == "trace" else {}
        operation = "max" if what == "operation" else "sum"
        second = w.summed(b, operation, "1" if what == "group" else "0", **meta)
    program = w.program(first, second)
    assert PackReductions()(program) is program


def test_each_kind_has_its_own_pack():
    w = Writer()
    x = w.input("primals_1")
    t = w.input("tangents_1")
    kinds = [(x, "sum", "0"), (x, "max", "0"), (x, "sum", "1"), (t, "sum", "0")]
    outputs = [w.summed(*kind) for _ in range(3) for kind in kinds]
    after = packed(w.program(*outputs))
    assert sizes(after) == [3] * 4
    assert after.remarks[1] == "3 reductions (max) over ranks in one"
    assert len(after.remarks) == 4


def test_what_depends_on_one_is_not_packed_with_it():
    w = Writer()
    chains = []
    for i in range(3):
        weight = w.summed(w.input(f"w{i}"))
        chains.append(w.summed(w.call(aten.div.Tensor, w.input(f"x{i}"), weight)))
    after = packed(w.program(*chains))
    assert sizes(after) == [3, 3]


def test_a_later_pack_takes_what_need_not_wait_for_it():
    w = Writer()
    a, b, c = (w.input(name) for name in "abc")
    alone = w.summed(a)  # of no weights: it fits both
    weight = w.summed(b, group="1")
    after = packed(w.program(alone, w.summed(w.call(aten.div.Tensor, c, weight))))
    assert sizes(after) == [1, 2]


def test_packs_do_not_wait_for_each_other():
    """Crosswise: of a → b in one group and b' → a' in the other, one pair can be packed."""
    w = Writer()
    a = w.summed(w.input("a"), group="0")
    b = w.summed(w.call(aten.mul.Tensor, a, 2.0), group="1")
    c = w.summed(w.input("c"), group="1")
    d = w.summed(w.call(aten.mul.Tensor, c, 2.0), group="0")
    assert sorted(sizes(packed(w.program(a, b, c, d)))) == [1, 1, 2]


def test_only_what_reads_an_earlier_one_moves():
    w = Writer()
    a, b = w.input("a"), w.input("b")
    first = w.summed(a)
    reader = w.call(aten.mul.Tensor, first, 2.0)
    other = w.call(aten.mul.Tensor, a, 3.0)
    again = w.call(aten.mul.Tensor, reader, other)
    between = w.call(aten.add.Tensor, b, other)
    second = w.summed(between)
    after = packed(w.program(again, second))
    assert sizes(after) == [2]
    order = [n.name for n in after.gm.graph.nodes]
    wanted = [a, b, other, between, *reductions(after), reader, again]
    assert [name for name in order if name in {n.name for n in wanted}] == [n.name for n in wanted]


def test_large_values_do_not_wait():
    """A layer that is scaled by a sum runs where it ran, not when the losses are summed."""
    w = Writer()
    x, a, b, c = w.input("x", (4, 4)), w.input("a"), w.input("b"), w.input("c")
    scale = w.summed(a)
    early = w.summed(b)
    layer = w.call(aten.mul.Tensor, x, scale)
    late = w.summed(w.call(aten.sum.default, layer)), w.summed(c)
    after = packed(w.program(layer, early, *late))
    assert sizes(after) == [2, 2]
    order = [n.name for n in after.gm.graph.nodes]
    assert order.index(layer.name) < order.index(reductions(after)[1].name)


def test_vectors_made_of_scalars_wait():
    w = Writer()
    a, b = w.summed(w.input("a")), w.summed(w.input("b"))
    mean = w.call(aten.mean.default, w.call(aten.stack.default, [a, b]))
    after = packed(w.program(mean, w.summed(w.input("c"))))
    assert sizes(after) == [3]


def write(w):
    return w.call(aten.copy_.default, w.input("buffer", (2,)), w.input("new", (2,)))


def draw(w):
    return w.call(aten.rand_like.default, w.input("p", (2,)))


@pytest.mark.parametrize("pin", [write, draw])
def test_nothing_moves_across_a_write_or_a_random_operator(pin):
    w = Writer()
    a, b, c, d = (w.input(name) for name in "abcd")
    first = [w.summed(a), w.summed(b)]
    middle = pin(w)
    after = packed(w.program(*first, middle, w.summed(c), w.summed(d)))
    assert sizes(after) == [2, 2]
    order = [n.name for n in after.gm.graph.nodes]
    place = [order.index(n.name) for n in reductions(after)]
    assert place[0] < order.index(middle.name) < place[1]


def random_program(seed, local):
    """Scalars and vectors, their products and sums over ranks.

    ``local`` says how long the vectors are and how often nodes are put in between that other ranks
    do not have.
    """
    choose, noise, w = random.Random(seed), random.Random(local), Writer()
    scalars = [w.input(f"primals_{i}") for i in range(4)]
    scalars.append(w.input("tangents_1"))
    vectors = [w.input("vector", (local,))]
    summed = []
    for _ in range(40):
        x, y = choose.choice(scalars), choose.choice(scalars)
        kind = choose.randrange(8)
        if kind < 2:
            scalars.append(w.call(aten.mul.Tensor, x, y))
        elif kind == 2:
            vectors.append(w.call(aten.mul.Tensor, choose.choice(vectors), x))
        elif kind == 3:
            scalars.append(w.call(aten.mean.default, choose.choice(vectors)))
        elif kind == 4:
            scalars.append(w.call(aten.amax.default, w.call(aten.stack.default, [x, y])))
        else:
            op, group = choose.choice(["sum", "sum", "max"]), choose.choice("01")
            summed.append(w.summed(w.call(aten.div.Tensor, x, 2.0), op, group))
            scalars.append(summed[-1])
        if noise.random() < 0.5:
            vectors[-1] = w.call(aten.mul.Tensor, vectors[-1], 1.0)
            scalars[-1] = w.call(aten.add.Tensor, scalars[-1], 0.0)
    return w.program(*summed)


def assert_no_vector_waits(before, after):
    """What stands before a vector that is not made of scalars has stood before it."""
    old, new = ([n.name for n in p.gm.graph.nodes] for p in (before, after))
    for node in before.gm.graph.nodes:
        if node.meta.get("val", torch.empty(())).ndim and node.target is not aten.stack.default:
            passed = set(new[: new.index(node.name)]) - set(old[: old.index(node.name)])
            assert passed.isdisjoint(old), (node.name, passed)


@pytest.mark.parametrize("seed", range(30))
def test_ranks_with_other_local_sizes_come_to_the_same_packs(seed):
    found = []
    for local in (1, 2, 300):
        before = random_program(seed, local)
        after = packed(before)
        assert sum(sizes(after)) == len(reductions(before))
        assert len(sizes(after)) < len(reductions(before))
        assert_no_vector_waits(before, after)
        found.append([(n.args[1:], n.meta["val"].shape) for n in reductions(after)])
    assert found[0] == found[1] == found[2]


# ---------------------------------------------------------------------- on ranks


def measured(mesh, how, layers, length, packing, *, head=None, **options):
    """Loss, terms and gradients of a step, and the sizes of the forward's small all-reduces."""
    forwards = []
    partition, apply = lower.min_cut_rematerialization_partition, PackReductions.__call__

    def watch(gm, *args, **kwargs):
        forward, backward = partition(gm, *args, **kwargs)
        found = [n.meta["val"].numel() for n in forward.graph.nodes if n.target is REDUCE]
        forwards.append([size for size in found if size <= 16])
        return forward, backward

    torch.manual_seed(0)
    student, teacher = (
        parallel(LM(64, 24, layers), mesh, sequence=True, head=head) for _ in range(2)
    )
    with (
        mock.patch.object(lower, "min_cut_rematerialization_partition", watch),
        mock.patch.object(PackReductions, "__call__", apply if packing else lambda _, p: p),
    ):
        mapping = {"blocks.*": "blocks.*", "norm": "norm"}
        found = step(student, teacher, length, how, mapping=mapping, **options)
    torch._dynamo.reset()
    return found, forwards


def parity(rank, how, layers, length, options):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    plain = AOT if how == UNFUSED else how  # which takes less long to compile
    wanted, before = measured(mesh, plain, layers, length, packing=False, **options)
    found, after = measured(mesh, how, layers, length, packing=True, **options)
    compare(found, wanted, how)
    if isinstance(how, dict) and how["backend"] == "aot_eager":
        for i in (0, 1):
            assert found[i].keys() == wanted[i].keys()
            assert all(torch.equal(found[i][name], value) for name, value in wanted[i].items())
    return before, after, found[2]["PackReductions"]


# Inductor's C++ kernels of torch 2.13 may read what a collective brings before it is there
# (github.com/pytorch/pytorch/issues/185509; not those of a GPU): so nothing is fused here.
UNFUSED = {"backend": "inductor", "options": {"max_fusion_size": 1}}
CASES = {  # how, layers, length, options; and how many sums there are
    "three terms": (AOT, 2, 8, {}, 3),
    "uneven": (AOT, 1, 7, {"feature_loss": "cosine"}, 2),
    # Tokens of the logits are sharded, too: divergence and label loss end in a sum each.
    "logits": ({**AOT, "fuse_head": False}, 1, 8, {"head": Shard(1)}, 4),
    "inductor": (UNFUSED, 1, 8, {}, 2),
    "regional": ("regional", 1, 8, {}, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_sums_of_all_terms_are_one(case):
    *args, count = CASES[case]
    for before, after, remark in run(2, parity, *args):
        assert before == [[1] * count]
        assert after == [[count]]
        assert f"{count} sums over ranks in one" in remark
