"""Texts of several choices for each sample: ids and masks ``[B, C, L]``, values ``[B·C, L, D]``."""

import pytest
import torch
from transformers import BertConfig, BertForMultipleChoice

import fxdistill
from fxdistill import Match

LAYERS = ("bert.encoder.layer.0", "bert.encoder.layer.1")
IDS = torch.randint(1, 50, (2, 3, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :, 2:], MASK[0, 1, 4:] = 0, 0
LABELS = torch.tensor([0, 2])


def chooser(layers, hidden=16):
    torch.manual_seed(layers)
    sizes = {"hidden_size": hidden, "intermediate_size": 24, "num_attention_heads": 2}
    return BertForMultipleChoice(
        BertConfig(vocab_size=50, num_hidden_layers=layers, hidden_dropout_prob=0, **sizes)
    ).eval()


def pair(mapping, compile=False, **options):
    return fxdistill.wrap(chooser(1), chooser(2), mapping, compile=compile, **options)


def values(distiller, of, ids=IDS, mask=MASK):
    found = []
    for model, path in zip((distiller.student, distiller.teacher), of, strict=True):
        hook = model.get_submodule(path).register_forward_hook(
            lambda module, args, output: found.append(
                output if isinstance(output, torch.Tensor) else output[0]
            )
        )
        model(input_ids=ids, attention_mask=mask)
        hook.remove()
    return found[0], found[1].detach()


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["eager", "graph"])
@pytest.mark.parametrize("weights", [None, torch.tensor([3.0, 1.0])], ids=["alike", "weighed"])
def test_padding_of_each_choice_is_left_out(weights, compile):
    distiller = pair({LAYERS[0]: LAYERS[1]}, compile)
    call = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    out = distiller(**call, token_weights=weights)
    out.loss.backward()
    learns = distiller.student.bert.embeddings.word_embeddings.weight
    found = learns.grad.clone()
    distiller.student.zero_grad()
    of_samples = torch.ones(2) if weights is None else weights
    s, t = values(distiller, LAYERS)
    w = (MASK * of_samples[:, None, None]).flatten(0, 1)
    wanted = ((s - t).square().mean(-1) * w).sum() / w.sum()
    torch.testing.assert_close(out.losses[LAYERS[0]], wanted.detach())
    ours, theirs = (
        model(input_ids=IDS, attention_mask=MASK).logits.log_softmax(-1)
        for model in (distiller.student, distiller.teacher)
    )
    each = (theirs.exp() * (theirs - ours)).sum(-1) - ours[torch.arange(2), LABELS]
    total = wanted + (each * of_samples).sum() / of_samples.sum()
    torch.testing.assert_close(out.loss, total)
    total.backward()
    torch.testing.assert_close(found, learns.grad, rtol=1e-4, atol=1e-7)
    pairs = distiller.report(**call).pairs
    assert pairs[0].weighed_by == "samples and tokens"


def test_what_is_padded_changes_nothing():
    distiller = pair({LAYERS[0]: LAYERS[1]}, feature_loss="similarity_preserving")
    other = IDS.masked_fill(MASK == 0, 7)
    losses = [
        distiller(input_ids=ids, attention_mask=MASK, labels=LABELS).loss for ids in (IDS, other)
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("loss", ["mse", "similarity_preserving"])
def test_weights_of_samples_are_those_of_their_choices(loss):
    """Of a value of one vector for each choice, and of choices that are compared."""
    mean = ("b l d -> b d", "mean")
    distiller = pair({LAYERS[0]: Match(teacher=LAYERS[1], loss=loss, reduce=mean)})
    call = {"input_ids": IDS, "attention_mask": MASK}
    out = distiller(**call, token_weights=torch.tensor([1.0, 0.0]))
    alone = distiller(input_ids=IDS[:1], attention_mask=MASK[:1])
    torch.testing.assert_close(out.losses[LAYERS[0]], alone.losses[LAYERS[0]])
    s, t = values(distiller, LAYERS, IDS[:1], MASK[:1])
    w = MASK[0].unsqueeze(-1)
    s, t = ((x * w).sum(1) / w.sum(1) for x in (s, t))
    wanted = getattr(fxdistill.losses, loss)(s, t, None)
    torch.testing.assert_close(out.losses[LAYERS[0]], wanted.detach())


def test_models_are_asked_about_choices_too():
    """A text as long as the model is wide: its lengths are told from others."""
    distiller = fxdistill.wrap(chooser(1, 6), chooser(2, 6), {LAYERS[0]: LAYERS[1]}, compile=False)
    out = distiller(input_ids=IDS, attention_mask=MASK, labels=LABELS)
    s, t = values(distiller, LAYERS)
    w = MASK.flatten(0, 1)
    wanted = ((s - t).square().mean(-1) * w).sum() / w.sum()
    torch.testing.assert_close(out.losses[LAYERS[0]], wanted.detach())
    assert "taken from their sizes" not in str(distiller.summary())
