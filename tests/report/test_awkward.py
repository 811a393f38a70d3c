"""Reports of awkward models, inputs and surroundings."""

import copy
import functools
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import fx, nn
from torch._prims import rng_prims
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BatchEncoding

import fxdistill
from fxdistill import Match
from fxdistill.compiler import backend
from fxdistill.graph.flops import flops_of
from tests.report.test_build import AOT, batch, llama, pair
from toys import MAPPING, Toy, tokens, toy_pair

aten = torch.ops.aten


def test_a_model_without_repeated_blocks_is_one_block():
    student, teacher = (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)) for _ in range(2))
    distiller = fxdistill.wrap(student, teacher, {}, task="classification", compile=AOT)
    report = distiller.report(torch.randn(4, 8), labels=torch.randint(0, 4, (4,)))
    (block,) = report.towers[1].blocks
    assert block.path == ""
    assert (block.forward, block.backward) == (report.flops.forward, report.flops.backward)
    assert block.forward > 0


@functools.cache
def reported():
    """What other reports of one step are compared with."""
    return pair().report(**batch(2, 16))


@pytest.mark.slow
def test_sizes_may_be_symbols():
    inputs, wanted = batch(2, 16), reported()
    for value in inputs.values():
        torch._dynamo.mark_dynamic(value, 1)
    found = pair().report(**inputs)
    assert found.stopped is None
    assert found.flops == wanted.flops
    assert found.memory.peak == pytest.approx(wanted.memory.peak, rel=0.01)


def test_a_report_is_of_a_step_that_trains_wherever_it_is_asked_for():
    distiller, ids = toys(), tokens()
    wanted = distiller.report(ids, labels=ids).memory
    with torch.inference_mode():
        assert distiller.report(ids, labels=ids).memory == wanted
        ids = tokens()
        assert distiller.report(ids, labels=ids).memory == wanted
        assert torch.is_inference_mode_enabled()


def test_nothing_is_compiled_where_nothing_learns(monkeypatch):
    distiller = pair({"backend": "inductor"})
    distiller.student.requires_grad_(False)
    monkeypatch.delattr(backend, "lower")
    report = distiller.report(**batch(2, 16))
    assert report.stopped is None
    assert report.memory is None
    assert report.passes
    assert any("nothing of the student learns" in text for text in report.warnings)


def toys():
    return fxdistill.wrap(*toy_pair(), MAPPING, task="causal_lm", compile=AOT)


class Padded(Toy):
    def __init__(self, depth):
        super().__init__(depth)
        self.config = type("Config", (), {"pad_token_id": 0})()

    def forward(self, input_ids):
        return super().forward(input_ids)


def padded():
    return fxdistill.wrap(Padded(2), Padded(3), MAPPING, task="causal_lm", compile=AOT)


def test_numbers_that_are_not_remembered_are_not_warned_of():
    distiller, ids = padded(), tokens().clamp(min=1)
    distiller(input_ids=ids, labels=ids)
    assert distiller.report().warnings == ()


def test_padding_is_looked_for_in_rows_only():
    ids = tokens()[0]
    assert not any("padding" in w for w in padded().report(input_ids=ids).warnings)


def test_weights_may_be_tensors_where_models_have_no_values():
    half = torch.tensor(0.5)
    with torch.device("meta"):
        models = llama(64, 1), llama(64, 2)
    matches = [Match("model.layers.0.mlp", "model.layers.1.mlp", weight=half)]
    report = fxdistill.wrap(*models, matches, feature_weight=half, compile=AOT).report(
        **batch(2, 16)
    )
    assert report.stopped is None
    assert report.pairs[0].weight == 0.5
    assert report.terms[-1].weight == 0.5


@pytest.mark.slow
def test_fake_models_take_real_inputs():
    with FakeTensorMode():
        models = llama(64, 2), llama(64, 3)
    matches = [Match(f"model.layers.{i}.mlp", f"model.layers.{i}.mlp") for i in range(2)]
    report = fxdistill.wrap(*models, matches, compile=AOT).report(**batch(2, 16))
    assert report.memory == reported().memory


class Whole(Toy):
    def forward(self, batch):
        return super().forward(batch["ids"])


def test_of_a_call_only_shapes_are_kept():
    distiller = fxdistill.wrap(Whole(2), Whole(3), MAPPING, logit_loss=None, compile=AOT)
    ids = tokens()
    given = BatchEncoding({"ids": ids})
    alive = weakref.ref(ids)
    distiller(given)
    assert given["ids"] is ids
    del given, ids
    gc.collect()
    assert alive() is None
    assert distiller.report().stopped is None


class Extra(Toy):
    def forward(self, ids, extra=None):
        return super().forward(ids)


def test_what_a_call_was_given_does_not_hinder_copies():
    distiller = fxdistill.wrap(Extra(2), Extra(3), MAPPING, logit_loss=None, compile=AOT)
    ids = tokens()
    distiller(ids)
    distiller.journal.called((), {"ids": ids, "extra": threading.Lock()})
    pickle.loads(pickle.dumps(distiller))
    made = copy.deepcopy(distiller)
    assert made.journal.events == []  # it has no graph yet
    made(ids)
    assert made.journal.events == [("capture", "first call")]
    assert len(distiller.journal.events) == 1


@pytest.mark.parametrize("kind", ["graphsafe_run_with_rng_state", "run_and_save_rng_state"])
@pytest.mark.parametrize("name", ["flash_attention", "flash_attention_for_cpu"])
def test_attention_that_a_checkpoint_repeats_is_counted(kind, name):
    attention = getattr(aten, f"_scaled_dot_product_{name}").default
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = torch.empty(2, 4, 16, 8, device="meta")
    kwargs = {"rng_state": None} if kind.startswith("graphsafe") else {}
    call = graph.call_function(getattr(rng_prims, kind), (attention, node, node, node), kwargs)
    call.meta["val"] = (node.meta["val"], None)
    assert flops_of(call) == 2 * 2 * (2 * 4 * 16 * 16 * 8)


class Selecting(Toy):
    def forward(self, ids):
        logits = super().forward(ids)["logits"]
        chosen = torch.nonzero(ids.flatten() > 3).flatten()
        return {"logits": logits + (logits.flatten(0, 1)[chosen] @ logits.new_ones(50, 3)).sum()}


def test_sizes_that_depend_on_values_are_not_guessed():
    distiller = fxdistill.wrap(Selecting(2), Toy(3), MAPPING, task="causal_lm", compile=AOT)
    ids = tokens()
    report = distiller.report(ids=ids, labels=ids)
    assert "depend on values" in report.stopped
    assert [p.student for p in report.pairs] == list(MAPPING)


def graphs():
    gc.collect()
    return sum(issubclass(type(value), fx.GraphModule) for value in gc.get_objects())


def test_reports_leave_nothing_behind():
    distiller, ids = toys(), tokens()
    distiller.report(ids, labels=ids)
    before = graphs()
    distiller.report(ids, labels=ids)
    assert graphs() == before
