"""Schedules of settings: their values, their files, and what a distiller makes of them."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch

import fxdistill
from fxdistill import Schedule, schedules
from fxdistill.errors import MatchWarning, OptionError
from fxdistill.training.schedules import described, from_description
from toys import Toy

EVERY = [
    schedules.linear(10, 1.0, 100, after=5),
    schedules.linear((1.0, 0.0), (0.0, 1.0), 4),
    schedules.cosine(4.0, 1.0, 10),
    schedules.piecewise({100: 1.0, 0: 4}),
    schedules.stages([10.0, 5.0, 1.0], every=3),
    schedules.stages([(1.0, 0.0), (0.5, 0.5)], every=3),
]


def test_linear_runs_between_two_steps_and_is_constant_outside():
    curve = schedules.linear(10.0, 2.0, 4, after=2)
    assert [curve(i) for i in range(9)] == [10, 10, 10, 8, 6, 4, 2, 2, 2]
    assert curve(np.int64(4)) == 6
    pair = schedules.linear((1.0, 0.0), (0.0, 1.0), 4)
    assert pair(1) == (0.75, 0.25)


def test_cosine_is_half_a_period():
    curve = schedules.cosine(4.0, 1.0, 10, after=1)
    assert curve(0) == curve(1) == 4.0
    assert curve(11) == curve(50) == 1.0
    for i in range(11):
        assert curve(i + 1) == pytest.approx(1 + 3 * math.cos(math.pi * i / 20) ** 2)


def test_piecewise_and_stages_jump():
    curve = schedules.piecewise({100: 1.0, 0: 4.0})
    assert [curve(i) for i in (0, 99, 100, 1000)] == [4.0, 4.0, 1.0, 1.0]
    curve = schedules.stages([10.0, 5.0, 1.0], every=2)
    assert [curve(i) for i in range(7)] == [10, 10, 5, 5, 1, 1, 1]


@pytest.mark.parametrize("curve", EVERY, ids=repr)
def test_a_schedule_pickles_prints_itself_and_is_json(curve):
    restored = from_description(json.loads(json.dumps(described(curve))))
    printed = eval(repr(curve), vars(schedules))
    for other in (pickle.loads(pickle.dumps(curve)), copy.deepcopy(curve), restored, printed):
        assert other == curve
        assert [other(i) for i in (0, 1, 7, 200)] == [curve(i) for i in (0, 1, 7, 200)]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda: schedules.linear(1.0, 0.0, 0), "steps=0 is no whole number from 1 on"),
        (lambda: schedules.linear(1.0, 0.0, 10, after=-1), "after=-1"),
        (lambda: schedules.linear("a", 0.0, 10), "start 'a' is no finite number"),
        (lambda: schedules.cosine(1.0, math.nan, 10), "end nan"),
        (lambda: schedules.cosine(1.0, (1.0, 2.0), 10), "not all numbers"),
        (lambda: schedules.piecewise({10: 1.0}), "say what holds from step 0"),
        (lambda: schedules.piecewise({0: 1.0, -3: 1.0}), "step=-3"),
        (lambda: schedules.piecewise({}), "a dict of values by step"),
        (lambda: schedules.stages([], every=3), "a list of values"),
        (lambda: schedules.stages([1.0, True], every=3), "value True"),
        (lambda: schedules.stages([1.0], every=0.5), "every=0.5"),
        (lambda: schedules.linear(1.0, 0.0, 3)(-1), "step -1"),
        (lambda: from_description({"schedule": "liner"}), "Nearest: 'linear'"),
    ],
)
def test_wrong_arguments_say_what_is_right(wrong, text):
    with pytest.raises(OptionError, match=text):
        wrong()


# ---- on a distiller

MAPPING = {"blocks.0": "blocks.1", "blocks.1": "blocks.3"}


def toy(mapping=MAPPING, models=None, **options):
    options = {"compile": False, "label_loss": None, **options}
    models = models or (Toy(2), Toy(4))
    return fxdistill.wrap(*models, mapping, task="causal_lm", **options)


def test_step_0_is_applied_at_once_and_each_step_after_it():
    distiller = toy()
    schedule = Schedule(
        distiller,
        temperature=schedules.linear(4.0, 1.0, 3),
        feature_weight=lambda step: 1.0 / (step + 1),
        logit_weight=0.5,
        weights={"blocks.1": schedules.stages([0.0, 2.0], every=2)},
    )
    seen = []
    for _ in range(4):
        seen.append(dict(distiller.settings))
        schedule.step()
    assert [s["temperature"] for s in seen] == [4.0, 3.0, 2.0, 1.0]
    assert [s["feature_weight"] for s in seen] == [1.0, 1 / 2, 1 / 3, 1 / 4]
    assert [s["blocks.1"] for s in seen] == [0.0, 0.0, 2.0, 2.0]
    assert {s["logit_weight"] for s in seen} == {0.5}
    assert {s["blocks.0"] for s in seen} == {1.0}
    assert schedule.last_step == 4
    assert "temperature=linear(4.0, 1.0, 3)" in repr(schedule)


def test_the_loss_is_that_of_a_distiller_with_the_settings_of_the_step():
    """The oracle is ``wrap`` with fixed settings, which has tests of its own."""
    scheduled = toy()
    schedule = Schedule(scheduled, temperature=schedules.cosine(4.0, 1.0, 2))
    ids = torch.randint(50, (2, 6))
    for step in range(3):
        tau = schedules.cosine(4.0, 1.0, 2)(step)
        fixed = fxdistill.wrap(
            *(scheduled._towers.modules[t] for t in ("student", "teacher")),
            MAPPING,
            temperature=tau,
            task="causal_lm",
            label_loss=None,
            compile=False,
        )
        assert torch.equal(scheduled(ids).loss, fixed(ids).loss)
        schedule.step()


def test_nothing_recompiles():
    distiller = toy(compile={"backend": "aot_eager"})
    schedule = Schedule(
        distiller,
        temperature=schedules.linear(4.0, 1.0, 4),
        weights={"blocks.0": schedules.stages([0, 1], every=2)},  # an integer, too
    )
    ids, graphs = torch.randint(50, (2, 6)), []
    for _ in range(5):
        distiller(ids).loss.backward()
        schedule.step()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1
    assert graphs[0] > 0


def test_a_threshold_of_importance_is_scheduled_and_nothing_recompiles():
    """Each step keeps what a distiller keeps whose threshold it is."""
    rule = fxdistill.Importance("student_entropy", threshold=0.0)
    distiller = toy(compile={"backend": "aot_eager"}, importance=rule)
    models = [distiller._towers.modules[t] for t in ("student", "teacher")]
    ids, kept, graphs = torch.randint(50, (2, 6)), [], []
    log_q = models[0](ids)["logits"].log_softmax(-1)
    ordered = (-(log_q.exp() * log_q).sum(-1)).detach().flatten().sort().values
    limits = [0.0, *(float(ordered[i : i + 2].mean()) for i in (3, 8))]
    schedule = Schedule(distiller, threshold=schedules.stages(limits, every=1))
    for limit in limits:
        rule = fxdistill.Importance("student_entropy", threshold=limit)
        fixed = toy(models=models, importance=rule)(ids)
        out = distiller(ids)
        torch.testing.assert_close(out.loss, fixed.loss)
        assert distiller.settings["threshold"] == limit
        kept.append(float(out.metrics["kept"]))
        out.loss.backward()
        schedule.step()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert kept == pytest.approx([1.0, 8 / 12, 3 / 12])
    assert len(set(graphs)) == 1


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "changes nothing"),
        ({"threshold": 0.5}, "there is no importance= with a threshold"),
        ({"temprature": 2.0}, "temperature"),
        ({"weights": {"blocks.7": 2.0}}, "no term 'blocks.7'. Nearest: 'blocks.1'"),
        ({"weights": {}}, "term name: schedule"),
        ({"temperature": schedules.linear(4.0, 0.0, 10)}, "temperature=0.0"),
        ({"temperature": "linear"}, "temperature='linear'"),
        ({"temperature": 2.0, "logit_weight": lambda step: math.inf}, "logit_weight=inf"),
        ({"weights": {"blocks.0": math.nan}}, r"weights\[blocks.0\]=nan"),
    ],
)
def test_a_wrong_schedule_fails_when_it_is_made_and_changes_nothing(settings, text):
    refused(toy(), settings, text)


def refused(distiller, settings, text):
    before = distiller.settings
    with pytest.raises(OptionError, match=text):
        Schedule(distiller, **settings)
    assert distiller.settings == before


def taught_by_two():
    torch.manual_seed(0)
    options = {"importance": fxdistill.Importance("divergence", threshold=0.1), "compile": False}
    return fxdistill.wrap(Toy(1), [Toy(1), Toy(2)], task="causal_lm", **options)


DOWN = schedules.linear(1.0, 0.0, 4)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"threshold": schedules.linear(1.0, -1.0, 4)}, r"at step 4: .*threshold=-1\.0"),
        ({"threshold": schedules.piecewise({0: 0.1, 7: -0.5})}, "at step 7: "),
        ({"teacher_weights": (DOWN, DOWN)}, "at step 4: .*not all of them 0"),
        ({"teacher_weights": (DOWN, schedules.stages([1.0, 0.0, 1.0], every=5))}, "at step 5: "),
        ({"teacher_weights": schedules.linear((1.0, 0.0), (-1.0, 1.0), 3)}, "at step 3: .*least 0"),
        ({"teacher_weights": (lambda step: 1.0, schedules.linear(1.0, -1.0, 4))}, "at step 4: "),
    ],
)
def test_what_set_refuses_later_fails_when_the_schedule_is_made(settings, text):
    refused(taught_by_two(), settings, text)


def test_what_set_takes_at_every_step_is_taken():
    up = schedules.cosine(0.0, 1.0, 4, after=1)
    schedule = Schedule(taught_by_two(), teacher_weights=(DOWN, up), threshold=DOWN)
    for _ in range(6):
        schedule.step()
    assert schedule.values["teacher_weights"] == (0.0, 1.0)
    own = Schedule(taught_by_two(), teacher_weights=(lambda step: 1.0 + step, DOWN))
    own.step()


def test_what_is_no_distiller_is_refused():
    with pytest.raises(OptionError, match=r"this is a DataParallel\. Pass the distiller inside"):
        Schedule(torch.nn.DataParallel(toy()), temperature=2.0)


def test_a_value_that_set_refuses_leaves_the_step_where_it_was():
    distiller = toy()
    schedule = Schedule(distiller, temperature=lambda step: 1.0 - step)
    with pytest.raises(OptionError, match="must be positive"):
        schedule.step()
    assert (schedule.last_step, distiller.settings["temperature"]) == (0, 1.0)


def settings_of(steps):
    return {
        "temperature": schedules.linear(4.0, 1.0, steps),
        "weights": {"blocks.0": schedules.piecewise({0: 1.0, 2: 0.5}), "blocks.1": 2.0},
    }


def test_a_saved_schedule_goes_on_where_it_was():
    first = Schedule(toy(), **settings_of(4), logit_weight=lambda step: 0.1 * step)
    for _ in range(3):
        first.step()
    state = json.loads(json.dumps(first.state_dict()))
    second = Schedule(toy(), **settings_of(4), logit_weight=lambda step: 0.1 * step)
    second.load_state_dict(state)
    assert second.distiller.settings == first.distiller.settings
    assert second.last_step == 3
    first.step()
    second.step()
    assert second.distiller.settings == first.distiller.settings
    assert second.state_dict() == first.state_dict()


def test_saved_schedules_are_used_as_in_torch_and_a_warning_says_so():
    first, second = Schedule(toy(), **settings_of(4)), Schedule(toy(), **settings_of(40))
    first.step()
    with pytest.warns(MatchWarning, match=r"temperature is used, linear\(4.0, 1.0, 4\)"):
        second.load_state_dict(first.state_dict())
    assert second.distiller.settings["temperature"] == 3.25


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({}, "what Schedule.state_dict"),
        ({"last_step": 1, "schedules": {"temperature": 1.0}}, r"lacks weights\[blocks.0\]"),
        ({"last_step": 2, "schedules": {"temperature": 0.0}}, "lacks"),
    ],
)
def test_a_state_of_other_settings_is_refused_and_changes_nothing(state, text):
    schedule = Schedule(toy(), **settings_of(4))
    before = schedule.distiller.settings, schedule.state_dict()
    with pytest.raises(OptionError, match=text):
        schedule.load_state_dict(state)
    wrong = {**schedule.state_dict(), "last_step": 2}
    wrong["schedules"] = {**wrong["schedules"], "temperature": -1.0}
    with pytest.raises(OptionError, match="must be positive"):
        schedule.load_state_dict(wrong)
    assert (schedule.distiller.settings, schedule.state_dict()) == before


def test_a_schedule_is_copied_with_its_distiller():
    schedule = Schedule(toy(), **settings_of(4))
    for other in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        other.step()
        assert other.distiller.settings["temperature"] == 3.25
        assert schedule.distiller.settings["temperature"] == 4.0


HALF = schedules.linear(1.0, 0.0, 2)


@pytest.mark.parametrize("given", [(HALF, 1.0), {"teacher0": HALF, "teacher1": 1.0}])
def test_tuples_and_dicts_of_schedules_are_handed_on_as_such(given):
    distiller = taught_by_two()
    schedule = Schedule(distiller, teacher_weights=given)

    def weights():
        return [distiller.settings[f"teacher_weights.teacher{i}"] for i in range(2)]

    schedule.step()
    assert weights() == [0.5, 1.0]
    saved = json.loads(json.dumps(schedule.state_dict()))
    schedule.step()
    assert weights() == [0.0, 1.0]
    schedule.load_state_dict(saved)
    assert weights() == [0.5, 1.0]
