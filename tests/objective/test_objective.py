"""The token rule and the joint objective, mostly eager, against the oracle and closed forms."""

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import fxdistill
from families import FAMILIES, spread
from fxdistill.losses.names import LOGIT_LOSSES
from oracle import FEATURE_LOSSES, Reference, check_gradients, check_losses, reference

VOCAB, ROWS, LENGTH = 50, 3, 8
PAIRS = [
    ("model.layers.0.self_attn", "model.layers.1.self_attn"),
    ("model.layers.0.mlp", "model.layers.2.mlp"),
]
ALL_TERMS = tuple(itertools.product((False, True), repeat=3))


def llama(layers: int, vocab: int = VOCAB, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = hf.LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=layers,
        max_position_embeddings=32,
        use_cache=False,
    )
    return spread(hf.LlamaForCausalLM(config))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.flat = nn.Linear(width, width)
        self.pool = nn.Linear(width, width)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        flat = self.flat(x.flatten(0, 1)).view_as(x)  # as mixtures of experts do
        pooled = self.pool(x.mean(1))
        return {
            "hidden": x + self.inner(x).tanh() + flat.sigmoid() + pooled[:, None],
            "pooled": pooled,
        }


class Handwritten(nn.Module):
    """No configuration, a tensor for output, dictionaries, flattened and pooled values inside."""

    def __init__(self, blocks: int, seed: int, width: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, VOCAB)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = self.dropout(block(x)["hidden"])
        return self.head(x)


class Tagger(nn.Module):
    """Each token alone: rows may be cut, padded and stacked without a change of any prediction."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCAB, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, VOCAB)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.body(self.embed(input_ids)).tanh())


@pytest.fixture(scope="module")
def llamas() -> tuple[nn.Module, nn.Module]:
    return llama(1, seed=0), llama(3, seed=1)


@pytest.fixture(scope="module")
def written() -> tuple[nn.Module, nn.Module]:
    return Handwritten(2, 0), Handwritten(3, 1)


def batch_of(
    padding: str | None = None, rows: int = ROWS, length: int = LENGTH
) -> dict[str, Tensor]:
    torch.manual_seed(2)
    ids = torch.randint(3, VOCAB, (rows, length))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :3] = mask[1, :1] = 0
    elif padding == "right":
        mask[0, -3:] = mask[1, -1:] = 0
    return {"input_ids": ids} if padding is None else {"input_ids": ids, "attention_mask": mask}


def labels_of(batch: dict[str, Tensor], prompt: bool = True) -> Tensor:
    labels = batch["input_ids"].masked_fill(
        batch.get("attention_mask", torch.ones(1, 1)) == 0, -100
    )
    if prompt:
        labels[2, :4] = -100
    return labels


def as_match(pair: tuple[Any, ...]) -> fxdistill.Match:
    return fxdistill.Match(pair[0], pair[1], weight=pair[2] if len(pair) == 3 else 1.0)


def compare(
    towers: tuple[nn.Module, nn.Module],
    batch: dict[str, Tensor],
    pairs: Any = (),
    settings: dict[str, Any] | None = None,
    mode: Any = False,
    task: str = "causal_lm",
    encoder_paths: tuple[str, ...] = (),
    **call: Any,
) -> Reference:
    """One step of both: `settings` are for `wrap`, `call` for the distiller, the oracle has all."""
    settings = settings or {}
    student, teacher = towers
    expected = reference(
        student, teacher, pairs, batch, task=task, encoder_paths=encoder_paths, **settings, **call
    )
    student.zero_grad(set_to_none=True)
    matches = [as_match(pair) for pair in pairs]
    distiller = fxdistill.wrap(student, teacher, matches, task=task, compile=mode, **settings)
    out = distiller(**batch, **call)
    out.loss.backward()
    check_losses(out, expected)
    check_gradients(student, expected)
    return expected


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


# ---- which tokens


def every_mask() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {
        "loss_mask": torch.rand(ROWS, LENGTH) > 0.3,
        "token_weights": torch.rand(ROWS, LENGTH) * 3,
    }


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


MODES = [False, pytest.param({"backend": "aot_eager"}, id="aot_eager")]
LONG_MODES = [False, pytest.param({"backend": "aot_eager"}, id="aot_eager", marks=pytest.mark.slow)]
SLOW_REGIONAL = pytest.param("regional", marks=pytest.mark.slow)


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


@pytest.mark.parametrize("alias", ["num_items", "num_items_in_batch"])
@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_items_are_the_denominator(written: Any, alias: str, kind: Any) -> None:
    batch, pairs = batch_of("left"), [("blocks.0", "blocks.1")]
    expected = reference(
        *written, pairs, batch, task="causal_lm", labels=labels_of(batch), num_items=37
    )
    written[0].zero_grad(set_to_none=True)
    distiller = fxdistill.wrap(*written, dict(pairs), task="causal_lm", compile=False)
    out = distiller(**batch, labels=labels_of(batch), **{alias: kind(37)})
    out.loss.backward()
    check_losses(out, expected)
    check_gradients(written[0], expected)


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
