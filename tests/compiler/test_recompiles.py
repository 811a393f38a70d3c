"""What compiles after the first step, and how a user hears of it: log, stances, modes."""

import copy
import logging

import pytest
import torch
from torch._dynamo.utils import counters

import fxdistill
from fxdistill.compiler import waiting as module
from fxdistill.compiler.waiting import waiting
from toys import MAPPING, assert_same_gradients, gradients, tokens, toy_pair

AOT = {"backend": "aot_eager"}


def ours(caplog):
    return [record for record in caplog.records if record.name.startswith("fxdistill")]


def lines(caplog):
    return [record.getMessage() for record in ours(caplog) if record.levelno == logging.WARNING]


def test_each_graph_but_the_first_is_one_line_with_its_reason(caplog):
    distiller = fxdistill.wrap(*toy_pair(), MAPPING, compile=AOT)
    distiller(tokens(3, 7)).loss.backward()
    distiller(tokens(3, 7)).loss.backward()
    assert lines(caplog) == []
    distiller(tokens(3, 9)).loss.backward()  # the length becomes symbolic
    distiller(tokens(3, 11)).loss.backward()
    (first,) = lines(caplog)
    assert "again" in first
    assert "expected 7, actual 9" in first
    assert "\n" not in first
    distiller.eval()
    with torch.no_grad():
        distiller(tokens(3, 7))
    assert len(lines(caplog)) == 2
    assert "another kind" in lines(caplog)[1]
    assert {record.name for record in ours(caplog)} == {"fxdistill.compiler"}


def test_quiet_silences_progress_and_no_warning(monkeypatch, caplog):
    monkeypatch.setattr(module, "SILENT", 0.0)
    caplog.set_level(logging.INFO, "fxdistill")
    monkeypatch.setenv("FXDISTILL_QUIET", "1")
    distiller = fxdistill.wrap(*toy_pair(), MAPPING, compile=AOT)
    distiller(tokens(3, 7)).loss.backward()
    assert ours(caplog) == []
    distiller(tokens(3, 9)).loss.backward()
    assert [record.levelno for record in ours(caplog)] == [logging.WARNING]
    monkeypatch.setenv("FXDISTILL_QUIET", "0")
    with waiting("a stage"):
        pass
    assert module.is_quiet() is False


@pytest.mark.parametrize("compile", [AOT, "regional"], ids=["one graph", "regional"])
def test_a_step_that_is_forced_to_be_eager_is_right_and_compiles_nothing(compile):
    pair = toy_pair("batchnorm")
    reference = copy.deepcopy(pair)
    counters.clear()
    with torch.compiler.set_stance("force_eager"):
        out = fxdistill.wrap(*pair, MAPPING, compile=compile)(tokens())
        out.loss.backward()
    assert not counters["stats"]
    want = fxdistill.wrap(*reference, MAPPING, compile=False)(tokens())
    want.loss.backward()
    torch.testing.assert_close(out.loss, want.loss)
    assert_same_gradients(gradients(pair[0]), gradients(reference[0]))


def test_whoever_forbids_recompiles_is_told_and_a_warm_step_goes_on():
    distiller = fxdistill.wrap(*toy_pair(), MAPPING, compile=AOT)
    distiller.warmup(tokens(3, 7))
    with torch.compiler.set_stance("fail_on_recompile"):
        distiller(tokens(3, 7)).loss.backward()
        with pytest.raises(RuntimeError, match="fail_on_recompile"):
            distiller(tokens(3, 9))
    with torch.compiler.set_stance("default"):
        distiller(tokens(3, 9)).loss.backward()
    assert [event for event, _ in distiller.journal.events] == ["capture", "recompile"]


def test_a_step_that_would_compile_again_may_run_eagerly_instead():
    """``eager_on_recompile``: another length runs as it is, and the warm one as compiled."""
    pair = toy_pair()
    plain = fxdistill.wrap(*copy.deepcopy(pair), MAPPING, compile=False)
    distiller = fxdistill.wrap(*pair, MAPPING, compile=AOT)
    distiller.warmup(tokens(3, 7))
    with torch.compiler.set_stance("eager_on_recompile"):
        for length in (9, 7, 11):
            out, want = distiller(tokens(3, length)), plain(tokens(3, length))
            out.loss.backward()
            want.loss.backward()
            torch.testing.assert_close(out.loss, want.loss)
            assert_same_gradients(gradients(pair[0]), gradients(plain.student))
    assert [event for event, _ in distiller.journal.events] == ["capture"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead"])
def test_a_mode_of_inductor_gives_the_same_step_and_the_second_one_compiles_nothing(mode):
    """CUDA graphs, which ``reduce-overhead`` asks for, there are none of on a CPU."""
    pair = toy_pair()
    plain = fxdistill.wrap(*copy.deepcopy(pair), MAPPING, compile=False)
    distiller = fxdistill.wrap(*pair, MAPPING, compile={"mode": mode})
    for step in range(2):
        counters.clear()
        out = distiller(tokens())
        out.loss.backward()
        assert bool(counters["stats"]) is (step == 0)
        assert bool(counters["inductor"]) is (step == 0)
        got = gradients(pair[0])
    want = plain(tokens())
    want.loss.backward()
    torch.testing.assert_close(out.loss, want.loss)
    assert_same_gradients(got, gradients(plain.student))
