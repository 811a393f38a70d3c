"""Which tokens count, mostly eager, against the oracle: masks, labels, items, decoders."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxdistill
from families import FAMILIES
from one_step import (
    LENGTH,
    LONG_MODES,
    MODES,
    PAIRS,
    ROWS,
    VOCAB,
    Tagger,
    batch_of,
    compare,
    every_mask,
    labels_of,
)
from oracle import check_gradients, check_losses, reference


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize(
    "given", [(), ("loss_mask",), ("token_weights",), ("loss_mask", "token_weights")]
)
@pytest.mark.parametrize("labelled", [False, True])
def test_the_token_rule(
    llamas: Any, padding: str | None, given: tuple[str, ...], labelled: bool
) -> None:
    batch = batch_of(padding)
    call: dict[str, Any] = {name: every_mask()[name] for name in given}
    if labelled:
        call["labels"] = labels_of(batch)
    compare(llamas, batch, PAIRS, **call)


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_the_token_rule_compiled(written: Any, task: str) -> None:
    batch = batch_of("left")
    call = {**every_mask(), "labels": labels_of(batch)}
    pairs = [("blocks.0", "blocks.1"), ("blocks.1.flat", "blocks.2.flat")]
    compare(written, batch, pairs, mode={"backend": "aot_eager"}, task=task, **call)


@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float32])
def test_masks_of_any_type(written: Any, kind: torch.dtype) -> None:
    batch = batch_of("right")
    batch["attention_mask"] = batch["attention_mask"].to(kind)
    mask = every_mask()["loss_mask"].to(kind)
    compare(written, batch, [("blocks.0", "blocks.1")], labels=labels_of(batch), loss_mask=mask)


@pytest.mark.parametrize("labelled", [False, True])
def test_masked_lm_is_not_shifted(written: Any, labelled: bool) -> None:
    batch = batch_of("right")
    call = {**every_mask(), **({"labels": labels_of(batch)} if labelled else {})}
    compare(written, batch, [("blocks.0", "blocks.1")], task="masked_lm", **call)
    compare(written, batch, task="masked_lm", **({"labels": call["labels"]} if labelled else {}))


def test_without_labels_the_last_position_counts(written: Any) -> None:
    batch = batch_of()
    student, teacher = written
    out = fxdistill.wrap(*written, task="causal_lm", compile=False)(**batch)
    with torch.no_grad():
        log_s, log_t = student(**batch).log_softmax(-1), teacher(**batch).log_softmax(-1)
        each = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(out.losses["logits"], each.mean())
    ones = torch.ones(ROWS, LENGTH)
    for call in ({"loss_mask": ones}, {"token_weights": ones}, {"labels": batch["input_ids"]}):
        out = fxdistill.wrap(*written, task="causal_lm", compile=False)(**batch, **call)
        torch.testing.assert_close(out.losses["logits"], each[:, :-1].mean())


def test_a_single_token_has_no_prediction_when_labelled(written: Any) -> None:
    batch = batch_of(length=1)
    expected = compare(written, batch, labels=batch["input_ids"])
    assert expected.loss == 0
    assert compare(written, batch).loss > 0


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_changes_nothing(padding: str) -> None:
    """Rows of three lengths, padded into one batch, or one by one with a common number of items."""
    towers = Tagger(0), Tagger(1)
    distiller = fxdistill.wrap(*towers, {"body": "body"}, task="causal_lm", compile=False)
    torch.manual_seed(4)
    rows = [torch.randint(0, VOCAB, (1, n)) for n in (3, 5, 8)]
    pads = [(8 - r.shape[1], 0) if padding == "left" else (0, 8 - r.shape[1]) for r in rows]
    ids = torch.cat([F.pad(r, p, value=7) for r, p in zip(rows, pads, strict=True)])
    mask = torch.cat([F.pad(torch.ones_like(r), p) for r, p in zip(rows, pads, strict=True)])
    labels = ids.masked_fill(mask == 0, -100)
    together = distiller(input_ids=ids, attention_mask=mask, labels=labels)
    items = {"num_items": 2 + 4 + 7, "num_feature_items": 3 + 5 + 8}
    alone = [distiller(input_ids=r, labels=r, **items) for r in rows]
    torch.testing.assert_close(together.loss, sum(out.loss for out in alone))
    # The pads' ids are labels here: the attention mask alone must be enough.
    masked = distiller(input_ids=ids, attention_mask=mask, labels=ids)
    torch.testing.assert_close(masked.loss, together.loss)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("nothing", ["labels", "loss_mask", "token_weights", "attention_mask"])
def test_no_token_gives_zero_and_zero_gradients(written: Any, nothing: str, mode: Any) -> None:
    batch = batch_of("left")
    call: dict[str, Tensor] = {"labels": labels_of(batch)}
    if nothing == "attention_mask":
        batch["attention_mask"] = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    else:
        call[nothing] = (
            torch.full((ROWS, LENGTH), -100) if nothing == "labels" else torch.zeros(ROWS, LENGTH)
        )
    # With labels alone gone, features still count; l2's own gradient is infinite at zero if forced.
    pairs = [] if nothing == "labels" else [("blocks.0", "blocks.1")]
    expected = compare(written, batch, pairs, {"feature_loss": "l2"}, mode, **call)
    assert expected.loss == 0
    assert all(p.grad is None or not p.grad.any() for p in written[0].parameters())


@pytest.mark.parametrize("items", [0, 5])
def test_no_token_gives_zero_over_any_number_of_items(written: Any, items: int) -> None:
    batch = batch_of("left")
    labels = torch.full((ROWS, LENGTH), -100)
    written[0].zero_grad(set_to_none=True)
    out = fxdistill.wrap(*written, task="causal_lm", compile=False)(
        **batch, labels=labels, num_items=items
    )
    out.loss.backward()
    assert out.loss == out.losses["logits"] == out.losses["labels"] == 0
    assert all(p.grad is None or not p.grad.any() for p in written[0].parameters())


def test_ignored_labels_leave_the_features(written: Any) -> None:
    batch = batch_of("left")
    labels = torch.full((ROWS, LENGTH), -100)
    expected = compare(written, batch, [("blocks.0", "blocks.1")], labels=labels)
    assert expected.losses["labels"] == expected.losses["logits"] == 0
    assert expected.losses["features"] > 0


def test_padding_does_not_count_without_a_task() -> None:
    """Nothing says how tokens line up: an error may ask, but pads must not be counted silently."""
    distiller = fxdistill.wrap(Tagger(0), Tagger(1), compile=False)
    batch = batch_of("right")
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 1)}
    try:
        losses = [distiller(**b).loss for b in (batch, other)]
    except fxdistill.errors.TaskError:
        return
    torch.testing.assert_close(*losses)


def test_weights_have_no_scale(written: Any) -> None:
    batch, weights = batch_of("left"), torch.rand(ROWS, LENGTH)
    distiller = fxdistill.wrap(*written, {"blocks.0": "blocks.1"}, task="causal_lm", compile=False)
    one, ten = (distiller(**batch, token_weights=w).loss for w in (weights, 10 * weights))
    torch.testing.assert_close(one, ten)


def test_a_mask_of_more_dimensions_weights_nothing(written: Any) -> None:
    mask = torch.ones(ROWS, 1, LENGTH, LENGTH).tril()
    compare(written, {**batch_of(), "attention_mask": mask}, [("blocks.0", "blocks.1")])


def test_flattened_tokens_are_weighted_and_pooled_ones_are_not(written: Any) -> None:
    batch = batch_of("right")
    pairs = [("blocks.0.flat", "blocks.1.flat"), ("blocks.0.pool", "blocks.2.pool")]
    expected = compare(written, batch, pairs, labels=labels_of(batch), **every_mask())
    with torch.no_grad():
        ours, theirs = (
            pooled_by(model, n, batch) for model, n in zip(written, (0, 2), strict=True)
        )
    torch.testing.assert_close(expected.losses["blocks.0.pool"], F.mse_loss(ours, theirs))


def pooled_by(model: nn.Module, block: int, batch: dict[str, Tensor]) -> Tensor:
    x = model.embed(batch["input_ids"])
    for earlier in model.blocks[:block]:
        x = earlier(x)["hidden"]
    return model.blocks[block](x)["pooled"]


# ---- items


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_items_are_the_denominator(written: Any, kind: Any) -> None:
    batch, pairs = batch_of("left"), [("blocks.0", "blocks.1")]
    expected = reference(
        *written, pairs, batch, task="causal_lm", labels=labels_of(batch), num_items=37
    )
    written[0].zero_grad(set_to_none=True)
    distiller = fxdistill.wrap(*written, dict(pairs), task="causal_lm", compile=False)
    out = distiller(**batch, labels=labels_of(batch), num_items=kind(37))
    out.loss.backward()
    check_losses(out, expected)
    check_gradients(written[0], expected)


def counted_by_trainers(labels: Tensor) -> Tensor:
    return (labels[:, 1:] != -100).sum()


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("labelled", ["text", "padding too", "weighed"])
def test_one_batch_of_a_trainer_has_the_loss_of_a_call(
    written: Any, padding: str, labelled: str
) -> None:
    """Trainers count labels, also of padding or behind it, where no prediction counts."""
    batch, pairs = batch_of(padding), [("blocks.0", "blocks.1")]
    labels = batch["input_ids"] if labelled == "padding too" else labels_of(batch)
    call = every_mask() if labelled == "weighed" else {}
    expected = reference(*written, pairs, batch, task="causal_lm", labels=labels, **call)
    written[0].zero_grad(set_to_none=True)
    distiller = fxdistill.wrap(*written, dict(pairs), task="causal_lm", compile=False)
    items = {"num_items_in_batch": counted_by_trainers(labels)}
    out = distiller(**batch, labels=labels, **call, **items)
    out.loss.backward()
    check_losses(out, expected)
    check_gradients(written[0], expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("importance", [None, fxdistill.Importance("divergence", keep=0.5)])
def test_batches_of_a_trainer_weigh_by_their_labels(mode: Any, importance: Any) -> None:
    """Each is a mean of its own, by weights and importance, times its share of the labels."""
    batch = batch_of("left")
    labels, weights = batch["input_ids"], torch.rand(ROWS, LENGTH) + 0.5
    options = {"task": "causal_lm", "importance": importance}
    one = fxdistill.wrap(Tagger(0), Tagger(1), {"body": "body"}, compile=False, **options)
    many = fxdistill.wrap(Tagger(0), Tagger(1), {"body": "body"}, compile=mode, **options)
    total, wanted = 0.0, 0.0
    for rows in (slice(0, 1), slice(1, 3)):
        part = {name: value[rows] for name, value in batch.items()}
        part |= {"labels": labels[rows], "token_weights": weights[rows]}
        out = many(**part, num_items_in_batch=counted_by_trainers(labels))
        out.loss.backward()
        mean = one(**part).loss * (counted_by_trainers(labels[rows]) / counted_by_trainers(labels))
        mean.backward()
        total, wanted = total + out.loss.item(), wanted + mean.item()
    assert total == pytest.approx(wanted, rel=1e-5)
    for (name, found), p in zip(many.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(found.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_number_of_predictions_goes_before_that_of_labels(written: Any) -> None:
    batch, pairs = batch_of("left"), {"blocks.0": "blocks.1"}
    distiller = fxdistill.wrap(*written, pairs, task="causal_lm", compile=False)
    call = {**batch, "labels": labels_of(batch), "num_items": 37}
    both, alone = distiller(**call, num_items_in_batch=2), distiller(**call)
    torch.testing.assert_close(both.losses, alone.losses)


@pytest.mark.parametrize("weighted", [False, True])
def test_items_of_features_too(written: Any, weighted: bool) -> None:
    batch = batch_of("left")
    call = every_mask() if weighted else {}
    pairs = [("blocks.0", "blocks.1"), ("blocks.1.flat", "blocks.2.flat")]
    compare(
        written, batch, pairs, labels=labels_of(batch), num_items=21, num_feature_items=34, **call
    )


@pytest.mark.parametrize("mode", MODES)
def test_accumulation_equals_one_large_batch(llamas: Any, mode: Any) -> None:
    """Micro-batches of different sizes, each padded by its own share."""
    # Tracing attention with symbolic sizes takes long, and weights are what this is about.
    towers, pairs = ((Tagger(0), Tagger(1)), [("body", "body")]) if mode else (llamas, PAIRS)
    student = towers[0]
    batch = batch_of("left")
    labels, weights = labels_of(batch), torch.rand(ROWS, LENGTH) + 0.5
    attended = batch["attention_mask"].float()
    counted = weights[:, 1:] * attended[:, 1:] * attended[:, :-1] * (labels[:, 1:] != -100)
    items = {"num_items": counted.sum(), "num_feature_items": (weights * attended).sum()}
    expected = reference(
        *towers, pairs, batch, task="causal_lm", labels=labels, token_weights=weights
    )
    distiller = fxdistill.wrap(*towers, dict(pairs), task="causal_lm", compile=mode)
    student.zero_grad(set_to_none=True)
    total = 0.0
    for part in (slice(0, 1), slice(1, 3)):
        inputs = {name: value[part] for name, value in batch.items()}
        out = distiller(**inputs, labels=labels[part], token_weights=weights[part], **items)
        out.loss.backward()
        total += float(out.loss.detach())
    assert total == pytest.approx(float(expected.loss), rel=1e-5)
    check_gradients(student, expected)


# ---- classification and encoder-decoders


@pytest.mark.parametrize("name", ["distilbert_classifier", "vit", "resnet"])
@pytest.mark.parametrize("labelled", [False, True])
def test_classification_weights_samples(name: str, labelled: bool) -> None:
    family = FAMILIES[name]()
    call: dict[str, Any] = {
        "loss_mask": torch.tensor([True, True, False]),
        "token_weights": torch.tensor([0.3, 2.0, 5.0]),
    }
    if labelled:
        call["labels"] = family.labels
    towers = family.student, family.teacher
    compare(towers, family.batch, list(family.mapping.items()), task="classification", **call)


def test_encoder_decoder_weights_index_the_decoder() -> None:
    family = FAMILIES["t5"]()
    torch.manual_seed(5)
    call = {
        "labels": family.labels,
        "loss_mask": torch.rand(family.labels.shape) > 0.3,
        "token_weights": torch.rand(family.labels.shape),
    }
    towers, pairs = (family.student, family.teacher), list(family.mapping.items())
    compare(towers, family.batch, pairs, task="seq2seq", encoder_paths=family.encoder_paths, **call)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
@pytest.mark.parametrize("labelled", [True, False])
def test_padding_of_a_decoder_counts_in_no_term(name: str, labelled: bool) -> None:
    """Its own mask says what is padding, for features and for logits, with labels and without."""
    family = FAMILIES[name]()
    torch.manual_seed(8)
    rows, length = family.labels.shape
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, length - 2 :] = 0
    ids = torch.randint(3, 60, (rows, length))
    batch = {**family.batch, "decoder_input_ids": ids, "decoder_attention_mask": mask}
    call = {"labels": family.labels} if labelled else {}
    towers, pairs = (family.student, family.teacher), list(family.mapping.items())
    compare(towers, batch, pairs, task="seq2seq", encoder_paths=family.encoder_paths, **call)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_more_padding_of_a_decoder_changes_nothing(name: str) -> None:
    """Two more positions, masked, whatever stands there: every term is what it was."""
    family = FAMILIES[name]()
    torch.manual_seed(9)
    rows, length = family.labels.shape
    ids = torch.randint(3, 60, (rows, length))
    decoder = [path for path in family.mapping if path not in family.encoder_paths]
    made = fxdistill.wrap(
        family.student, family.teacher, {p: family.mapping[p] for p in decoder}, compile=False
    )

    def losses(more: int) -> dict[str, float]:
        extra = torch.randint(3, 60, (rows, more))
        kept, padded = torch.ones(rows, length), torch.zeros(rows, more)
        given = {
            "decoder_input_ids": torch.cat([ids, extra], 1),
            "decoder_attention_mask": torch.cat([kept, padded], 1).long(),
        }
        out = made(**{**family.batch, **given})
        return {term: float(value) for term, value in out.losses.items()}

    assert losses(2) == pytest.approx(losses(0), rel=1e-5)


def test_encoder_and_decoder_of_equal_lengths_are_told_apart() -> None:
    """Both sequences have the mask's length, so shapes alone cannot say whose weights apply."""
    family = FAMILIES["bart"]()
    labels = family.batch["input_ids"].flip(1).clone()
    labels[0, 6:] = -100
    call = {"labels": labels, "loss_mask": torch.rand(labels.shape) > 0.5}
    towers, pairs = (family.student, family.teacher), list(family.mapping.items())
    compare(towers, family.batch, pairs, task="seq2seq", encoder_paths=family.encoder_paths, **call)


def test_decoder_inputs_that_are_given_are_taken() -> None:
    family = FAMILIES["t5"]()
    torch.manual_seed(6)
    batch = {**family.batch, "decoder_input_ids": torch.randint(3, 90, family.labels.shape)}
    towers, pairs = (family.student, family.teacher), list(family.mapping.items())
    for call in ({"labels": family.labels}, {}, {"loss_mask": family.labels != -100}):
        compare(towers, batch, pairs, task="seq2seq", encoder_paths=family.encoder_paths, **call)


@pytest.mark.parametrize("mode", LONG_MODES)
def test_decoder_embeddings_that_are_given_are_taken(mode: Any) -> None:
    family = FAMILIES["bart"]()
    torch.manual_seed(7)
    shape = (*family.labels.shape, family.student.config.d_model)
    batch = {**family.batch, "decoder_inputs_embeds": torch.randn(shape)}
    towers, pairs = (family.student, family.teacher), list(family.mapping.items())
    call = {"labels": family.labels, "encoder_paths": family.encoder_paths}
    compare(towers, batch, pairs, mode=mode, task="seq2seq", **call)
