"""SumEarly: which sums over ranks move, how far, and that no number changes."""

import pytest
import torch

import fxdistill
from fxdistill.passes import PackReductions, SumEarly
from summed import REDUCE, Writer, aten, reductions, sizes, values

TERMS, STUDENT = {"custom": {"fxdistill": "objective"}}, {"custom": {"fxdistill": "student"}}
DRAW, COPY = aten.rand_like.default, aten.copy_.default


def step(between=None, *, weighed_by_student=False, waits=True):
    """Three layers, each with a term behind it: Σ w over ranks, a gradient, the value over ranks.

    ``between`` adds an operator behind each layer. Where no gradient waits for Σ w, the value does.
    """
    w = Writer()
    x, weights, buffer, new = (w.input(name, (4,)) for name in ("x", "weights", "buffer", "new"))
    outputs = []
    for _ in range(3):
        x = w.call(aten.mul.Tensor, x, 2.0, **STUDENT)
        if between is not None:
            read = (buffer, new) if between is COPY else (new,)
            outputs.append(w.call(between, *read, **STUDENT))
        counted = w.call(aten.sum.default, x if weighed_by_student else weights, **TERMS)
        items = w.summed(counted, **TERMS)
        gradient = w.call(aten.div.Tensor, x, items, **TERMS) if waits else x
        value = w.call(aten.sum.default, gradient, **TERMS)
        value = value if waits else w.call(aten.div.Tensor, value, items, **TERMS)
        outputs += [gradient, w.summed(value, **TERMS)]
    return w.program(*outputs)


def moved(program):
    """The program after the pass, which must change no value and leave nothing more to do."""
    after = fxdistill.run(program, (SumEarly(),))
    for found, wanted in zip(values(after), values(program), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert SumEarly()(after) is after
    return after


def packed(program):
    return sizes(fxdistill.run(program, (PackReductions(),)))


@pytest.mark.parametrize(("between", "wanted"), [(None, [3, 3]), (DRAW, [3, 1, 1, 1])])
def test_denominators_are_summed_first_and_packed(between, wanted):
    before = step(between)
    assert len(packed(before)) > len(wanted)
    after = moved(before)
    assert packed(after) == wanted
    called = [n for n in after.gm.graph.nodes if n.op == "call_function"]
    assert [n.target for n in called[:6]] == [aten.sum.default, REDUCE] * 3


def test_nothing_moves_across_a_write():
    before = step(COPY)
    assert SumEarly()(before) is before


def test_weights_that_a_model_computes_are_summed_behind_it():
    after = moved(step(weighed_by_student=True))
    order = list(after.gm.graph.nodes)
    for node in reductions(after)[::2]:
        layer = node.all_input_nodes[0].all_input_nodes[0]
        assert order[order.index(layer) + 1 : order.index(layer) + 3] == [
            *node.all_input_nodes,
            node,
        ]


def test_sums_that_only_values_wait_for_stay():
    before = step(waits=False)
    assert SumEarly()(before) is before
    assert packed(before) == [3, 3]
