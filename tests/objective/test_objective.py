"""The joint objective, mostly eager, against the oracle and closed forms: terms, settings."""

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import fxdistill
from fxdistill.losses.names import LOGIT_LOSSES
from one_step import (
    ALL_TERMS,
    LONG_MODES,
    MODES,
    PAIRS,
    SLOW_REGIONAL,
    Handwritten,
    Tagger,
    as_match,
    batch_of,
    compare,
    labels_of,
    llama,
)
from oracle import FEATURE_LOSSES, check_gradients, check_losses, reference

# ---- which terms


@pytest.mark.filterwarnings("ignore:no term is in the loss:fxdistill.errors.MatchWarning")
@pytest.mark.parametrize(("logits", "labelled", "features"), ALL_TERMS)
def test_any_subset_of_terms(llamas: Any, logits: bool, labelled: bool, features: bool) -> None:
    batch = batch_of("left")
    settings = {} if logits else {"logit_loss": None}
    call = {"labels": labels_of(batch)} if labelled else {}
    expected = compare(llamas, batch, PAIRS if features else [], settings, **call)
    assert len(expected.losses) == logits + labelled + 3 * features


def test_labels_can_be_given_without_a_label_loss(llamas: Any) -> None:
    batch = batch_of("left")
    expected = compare(llamas, batch, PAIRS, {"label_loss": None}, labels=labels_of(batch))
    assert "labels" not in expected.losses


def test_no_mapping_is_no_feature_term(llamas: Any) -> None:
    batch = batch_of()
    for mapping in (None, {}, []):
        out = fxdistill.wrap(*llamas, mapping, compile=False)(**batch)
        assert set(out.losses) == {"logits"}


@pytest.mark.parametrize(
    ("logit_loss", "feature_loss"), list(itertools.product(LOGIT_LOSSES, FEATURE_LOSSES))
)
def test_every_pair_of_losses(written: Any, logit_loss: str, feature_loss: str) -> None:
    batch = batch_of("right")
    settings = {"logit_loss": logit_loss, "feature_loss": feature_loss, "temperature": 1.5}
    pairs = [("blocks.0", "blocks.1"), ("blocks.1.inner", "blocks.2.inner")]
    compare(written, batch, pairs, settings, labels=labels_of(batch))


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_a_configured_loss(written: Any, beta: float) -> None:
    batch = batch_of("left")
    expected = reference(*written, [], batch, task="causal_lm", logit_loss="jsd", beta=beta)
    loss = functools.partial(fxdistill.losses.jsd, beta=beta)
    written[0].zero_grad(set_to_none=True)
    out = fxdistill.wrap(*written, task="causal_lm", logit_loss=loss, compile=False)(**batch)
    out.loss.backward()
    check_losses(out, expected)
    check_gradients(written[0], expected)


def test_callables_see_tokens_and_weights(written: Any) -> None:
    """The documented signatures are enough to write a loss: plain weighted averages here."""
    batch = batch_of("left")

    def absolute(student: Tensor, teacher: Tensor, weights: Tensor | None) -> Tensor:
        assert weights is not None
        return ((student - teacher).abs().mean(-1) * weights).sum() / weights.sum()

    def cross(
        student_logits: Tensor, teacher_logits: Tensor, *, temperature: Any, weights: Tensor
    ) -> Tensor:
        each = -(teacher_logits / temperature).softmax(-1) * (
            student_logits / temperature
        ).log_softmax(-1)
        return (each.sum(-1) * weights).sum() / weights.sum() * temperature**2

    pairs = [("blocks.0.inner", "blocks.1.inner")]
    names = {"feature_loss": "l1", "logit_loss": "soft_cross_entropy", "temperature": 2.0}
    expected = reference(*written, pairs, batch, task="causal_lm", labels=labels_of(batch), **names)
    settings = {**names, "feature_loss": absolute, "logit_loss": cross}
    written[0].zero_grad(set_to_none=True)
    distiller = fxdistill.wrap(*written, dict(pairs), task="causal_lm", compile=False, **settings)
    out = distiller(**batch, labels=labels_of(batch))
    out.loss.backward()
    check_losses(out, expected)
    check_gradients(written[0], expected)


# ---- inputs, vocabularies, settings


@pytest.mark.parametrize("mode", LONG_MODES)
def test_positional_inputs_mean_what_their_names_mean(llamas: Any, mode: Any) -> None:
    batch = batch_of("left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = compare(llamas, batch, PAIRS, labels=labels_of(batch))
    llamas[0].zero_grad(set_to_none=True)
    distiller = fxdistill.wrap(*llamas, [as_match(p) for p in PAIRS], compile=mode)
    out = distiller(ids, mask, labels=labels_of(batch))
    out.loss.backward()
    check_losses(out, expected)
    check_gradients(llamas[0], expected)
    changed = {"input_ids": ids.flip(1)}
    by_name = distiller(**batch, teacher_inputs=changed).losses["logits"]
    torch.testing.assert_close(
        distiller(ids, mask, teacher_inputs=changed).losses["logits"], by_name, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("mode", MODES)
def test_teacher_inputs_are_laid_over_the_shared_ones(written: Any, mode: Any) -> None:
    batch, pairs, settings = batch_of("left"), [("blocks.0", "blocks.1")], {"temperature": 2.0}
    seen = {"input_ids": batch["input_ids"].flip(1)}
    call = {"labels": labels_of(batch), "teacher_inputs": seen}
    expected = compare(written, batch, pairs, settings, mode, **call)
    without = reference(*written, pairs, batch, task="causal_lm", labels=call["labels"], **settings)
    assert expected.loss != without.loss


@pytest.mark.parametrize(("ours", "theirs"), [(100, 96), (96, 100)])
@pytest.mark.parametrize("logit_loss", LOGIT_LOSSES)
def test_padded_vocabularies(ours: int, theirs: int, logit_loss: str) -> None:
    towers, batch = (llama(1, ours), llama(2, theirs, seed=1)), batch_of("left")
    compare(towers, batch, [], {"logit_loss": logit_loss}, labels=labels_of(batch))


def test_other_vocabularies_are_refused_unless_told() -> None:
    towers, batch = (llama(1, 100), llama(2, 120, seed=1)), batch_of()
    with pytest.raises(fxdistill.errors.FxDistillError):
        fxdistill.wrap(*towers, compile=False)(**batch)
    compare(towers, batch, [], {"vocab_size": 90}, labels=labels_of(batch))


def test_all_weights_and_the_temperature(llamas: Any) -> None:
    batch = batch_of("right")
    settings = {"logit_weight": 0.7, "feature_weight": 3.0, "label_weight": 0.2, "temperature": 4.0}
    pairs = [(*PAIRS[0], 0.25), (*PAIRS[1], 2.0)]
    expected = compare(llamas, batch, pairs, settings, labels=labels_of(batch))
    parts = expected.losses
    total = 0.7 * parts["logits"] + 3 * parts["features"] + 0.2 * parts["labels"]
    torch.testing.assert_close(total, expected.loss)


@pytest.mark.parametrize("mode", [*MODES, SLOW_REGIONAL])
def test_set_changes_the_next_call(written: Any, mode: Any) -> None:
    student, pairs, batch = written[0], [("blocks.0", "blocks.1")], batch_of("left")
    labels = labels_of(batch)
    distiller = fxdistill.wrap(*written, dict(pairs), task="causal_lm", compile=mode)
    settings: dict[str, float] = {}
    for change in (
        {},
        {"feature_weight": 0.3, "temperature": 2.0},
        {"logit_weight": 0.0, "label_weight": 5.0},
    ):
        distiller.set(**change)
        settings |= change
        expected = reference(*written, pairs, batch, task="causal_lm", labels=labels, **settings)
        student.zero_grad(set_to_none=True)
        out = distiller(**batch, labels=labels)
        out.loss.backward()
        check_losses(out, expected)
        check_gradients(student, expected)


@pytest.mark.parametrize("mode", MODES)
def test_set_leaves_a_pending_backward_alone(written: Any, mode: Any) -> None:
    student, pairs, batch = written[0], [("blocks.0", "blocks.1")], batch_of()
    expected = reference(*written, pairs, batch, task="causal_lm", temperature=2.0)
    student.zero_grad(set_to_none=True)
    distiller = fxdistill.wrap(
        *written, dict(pairs), task="causal_lm", temperature=2.0, compile=mode
    )
    out = distiller(**batch)
    distiller.set(temperature=1.0, feature_weight=9.0, logit_weight=7.0)
    out.loss.backward()
    check_losses(out, expected)
    check_gradients(student, expected)


def test_set_refuses_unknown_names(llamas: Any) -> None:
    distiller = fxdistill.wrap(*llamas, compile=False)
    with pytest.raises((fxdistill.errors.FxDistillError, TypeError)):
        distiller.set(temprature=2.0)


@pytest.mark.parametrize("mode", MODES)
def test_autocast(llamas: Any, mode: Any) -> None:
    batch = batch_of("left")
    labels = labels_of(batch)
    expected = reference(*llamas, PAIRS, batch, task="causal_lm", labels=labels, autocast=True)
    llamas[0].zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = fxdistill.wrap(*llamas, dict(PAIRS), compile=mode)(**batch, labels=labels)
    out.loss.backward()
    check_losses(out, expected, rtol=1e-2)
    check_gradients(llamas[0], expected, rtol=3e-2, floor=1e-2)


# ---- matches and towers


def test_a_path_matched_again_is_numbered(written: Any) -> None:
    batch = batch_of("left")
    matches = [
        fxdistill.Match("blocks.0", "blocks.1", loss="l1"),
        fxdistill.Match("blocks.0", "blocks.2"),
        fxdistill.Match("blocks.0", "blocks.0", loss="cosine", weight=0.5),
    ]
    distiller = fxdistill.wrap(*written, matches, task="causal_lm", logit_loss=None, compile=False)
    out = distiller(**batch)
    names = ["blocks.0", "blocks.0#2", "blocks.0#3"]
    assert set(out.losses) == {"features", *names}
    for name, match, loss in zip(names, matches, ("l1", "mse", "cosine"), strict=True):
        alone = reference(
            *written, [("blocks.0", match.teacher)], batch, task="causal_lm", feature_loss=loss
        )
        torch.testing.assert_close(out.losses[name], alone.losses["blocks.0"])
    each = [out.losses[name] for name in names]
    torch.testing.assert_close(out.losses["features"], (each[0] + each[1] + 0.5 * each[2]) / 3)


def test_ports_name_inputs_and_items(written: Any) -> None:
    batch, Match = batch_of("left"), fxdistill.Match
    ports = {"student_port": "input", "teacher_port": "input"}
    pooled = {"student_port": "output.pooled", "teacher_port": "output.pooled"}
    second = {"student_port": "output[1]", "teacher_port": "output[1]"}
    matches = [
        Match("blocks.0", "blocks.1"),
        Match("blocks.1", "blocks.2", **ports),
        Match("blocks.0.pool", "blocks.1.pool"),
        Match("blocks.0", "blocks.1", **pooled),
        Match("blocks.0", "blocks.1", **second),
    ]
    distiller = fxdistill.wrap(*written, matches, task="causal_lm", compile=False)
    losses = distiller(**batch).losses
    torch.testing.assert_close(losses["blocks.1:input"], losses["blocks.0"])
    torch.testing.assert_close(losses["blocks.0:output.pooled"], losses["blocks.0.pool"])
    torch.testing.assert_close(losses["blocks.0:output[1]"], losses["blocks.0.pool"])


class Overwriting(Tagger):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.body(self.embed(input_ids))
        hidden.mul_(3).relu_()  # the tap of `body` is what it returned
        return self.head(hidden)


@pytest.mark.parametrize("mode", [*MODES, "regional"])
def test_values_written_after_the_tap(mode: Any) -> None:
    compare((Overwriting(0), Overwriting(1)), batch_of("left"), [("body", "body")], mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_the_teacher_does_not_drop_out(mode: Any) -> None:
    towers = Handwritten(2, 0), Handwritten(3, 1, dropout=0.5).train()
    compare(towers, batch_of("left"), [("blocks.0", "blocks.1")], mode=mode)


def test_a_teacher_that_learns(written: Any) -> None:
    """Every tower's gradient is that of the same loss, whoever is called the teacher."""
    student, teacher = written
    batch = batch_of("left")
    distiller = fxdistill.wrap(
        *written, {"blocks.0": "blocks.1"}, task="causal_lm", freeze_teacher=False, compile=False
    )
    for model in written:
        model.zero_grad(set_to_none=True)
    distiller(**batch).loss.backward()
    expected = reference(
        teacher,
        student,
        [("blocks.1", "blocks.0")],
        batch,
        task="causal_lm",
        logit_loss="reverse_kl",
    )
    check_gradients(teacher, expected)
    for model in written:
        model.zero_grad(set_to_none=True)
