"""Models that read an image and a text, cold: as they come from a constructor, in every mode."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import fxdistill
from fxdistill.errors import CaptureError

AOT = {"backend": "aot_eager"}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
IMAGE, START, END = 60, 62, 63  # an image's four tokens, and what stands around them in Qwen


def llava(layers):
    """Its vision tower records hidden states: the model reads those of one of its layers."""
    torch.manual_seed(layers)
    vision = CLIPVisionConfig(**SIZES, num_hidden_layers=layers, image_size=8, patch_size=4)
    text = LlamaConfig(**SIZES, vocab_size=64, num_hidden_layers=layers, use_cache=False)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    return LlavaForConditionalGeneration(config)


def qwen(layers):
    """Positions of three axes in the text, windows of attention in the image."""
    torch.manual_seed(layers)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    text = {**SIZES, **tokens, "vocab_size": 64, "num_hidden_layers": layers, "use_cache": False}
    vision = {"depth": layers, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4}
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {"window_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [layers - 1]}
    config = Qwen2_5_VLConfig(
        text_config={**text, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=61,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def batch(name, side):
    """Two texts with an image each, the first with three tokens of padding; images no labels.

    Qwen's have as many patches as tokens: 32 of each, which must not be taken for one another.
    """
    words = torch.randint(4, 50, (2, 10), generator=torch.Generator().manual_seed(0))
    middle = [IMAGE] * 4 if name == "llava" else [START, *[IMAGE] * 4, END]
    padding, image = torch.zeros(1, 3, dtype=torch.int64), torch.tensor([middle])
    first = [words[:1, :2], image, words[:1, 2:7]]
    second = [words[1:, :2], image, words[1:, 2:]]
    first = [padding, *first] if side == "left" else [*first, padding]
    ids = torch.cat([torch.cat(first, 1), torch.cat(second, 1)])
    mask = torch.ones_like(ids)
    mask[0, slice(0, 3) if side == "left" else slice(-3, None)] = 0
    labels = ids.masked_fill((ids >= IMAGE) | (mask == 0), -100)
    inputs = {"input_ids": ids, "attention_mask": mask}
    generator = torch.Generator().manual_seed(1)
    if name == "llava":
        inputs["pixel_values"] = torch.rand(2, 3, 8, 8, generator=generator)
    else:  # of two sizes: 4 × 4 patches are four tokens, and so are 8 × 2
        inputs["pixel_values"] = torch.rand(32, 3 * 2 * 4 * 4, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4], [1, 8, 2]])
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return inputs, labels


MAKE = {"llava": llava, "qwen": qwen}
VISION = {"llava": "model.vision_tower.encoder.layers.{}.mlp", "qwen": "model.visual.blocks.{}.mlp"}


def pairs_of(name):
    language = "model.language_model.layers.{}.{}"
    return {
        language.format(0, "mlp"): language.format(1, "mlp"),
        language.format(1, "self_attn"): language.format(2, "self_attn"),
        VISION[name].format(0): VISION[name].format(1),
    }


def plain_step(name, inputs, labels):
    """The step in plain torch: hooks, and the formulas of the README."""
    student, teacher = MAKE[name](2), MAKE[name](3).eval()
    student.train()
    values = {}

    def keep(model, path):
        def hook(module, args, out):
            values[model, path] = out[0] if isinstance(out, tuple) else out

        model.get_submodule(path).register_forward_hook(hook)

    for ours, theirs in pairs_of(name).items():
        keep(student, ours)
        keep(teacher, theirs)
    with torch.no_grad():
        target = teacher(**inputs).logits[:, :-1].log_softmax(-1)
    logits = student(**inputs).logits[:, :-1]

    def mean(each, weights):
        return (each * weights).sum() / weights.sum()

    mask = inputs["attention_mask"].float()
    counts = mask[:, 1:] * mask[:, :-1] * (labels[:, 1:] != -100)
    divergence = (target.exp() * (target - logits.log_softmax(-1))).sum(-1)
    targets = labels[:, 1:].clamp(min=0)
    losses = {
        "logits": mean(divergence, counts),
        "labels": mean(cross_entropy(logits.mT, targets, reduction="none"), counts),
    }
    for ours, theirs in pairs_of(name).items():
        squares = (values[student, ours] - values[teacher, theirs]).square().mean(-1)
        # An image's patches are no tokens of the text: all of them count.
        weights = mask if "language" in ours else torch.ones_like(squares)
        losses[ours] = mean(squares, weights)
    losses["features"] = sum(losses[path] for path in pairs_of(name)) / 3
    total = losses["logits"] + losses["labels"] + losses["features"]
    total.backward()
    return total.detach(), {n: v.detach() for n, v in losses.items()}, gradients(student)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_step(name, side, mode):
    inputs, labels = batch(name, side)
    loss, losses, grads = plain_step(name, inputs, labels)
    student = MAKE[name](2).train()
    distiller = fxdistill.wrap(student, MAKE[name](3), pairs_of(name), compile=mode)
    out = distiller(**inputs, labels=labels)
    out.loss.backward()
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(out.loss.detach(), loss, **close)
    torch.testing.assert_close(dict(out.losses), losses, **close)
    found = gradients(student)
    # In one graph a parameter without effect has no gradient; run as it is, one of zeros.
    assert {n for n, g in grads.items() if g.any()} <= set(found) <= set(grads)
    torch.testing.assert_close(found, {n: grads[n] for n in found}, **close)
    assert any("vis" in n for n in found)
    return distiller


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MAKE)
def test_eager(name, side):
    assert_step(name, side, False)


@pytest.mark.parametrize("name", MAKE)
def test_regional(name):
    assert_step(name, "left", "regional")


@pytest.mark.parametrize("side", ["left", "right"])
def test_llava_is_one_graph(side):
    assert_step("llava", side, AOT)


def test_qwen_says_what_stops_the_capture_and_how_to_go_on():
    """The sizes of its images are data: the vision tower splits its patches by them."""
    inputs, labels = batch("qwen", "left")
    distiller = fxdistill.wrap(qwen(2), qwen(3), pairs_of("qwen"), compile=AOT)
    with pytest.raises(CaptureError) as caught:
        distiller(**inputs, labels=labels)
    said = str(caught.value)
    assert "in the teacher" in said
    assert "vision_utils.py" in said
    assert "depends on the values of an input" in said
    assert 'compile="regional"' in said


def test_qwen_falls_back_where_it_is_asked_to():
    with pytest.warns(UserWarning, match='falling back to compile="regional"'):
        distiller = assert_step("qwen", "right", {**AOT, "fallback": "regional"})
    assert distiller.options.mode == "regional"


@pytest.mark.parametrize("name", MAKE)
def test_a_look_at_fake_tensors_leaves_a_cold_model_cold(name):
    """Its first run puts hooks into it: where they went in and their note was lost, twice."""
    inputs, labels = batch(name, "left")
    student, teacher = MAKE[name](2), MAKE[name](3)
    distiller = fxdistill.wrap(student, teacher, pairs_of(name), compile=False)
    distiller(**inputs, labels=labels)
    warm = MAKE[name](2)
    warm(**inputs)
    hooks = [[len(m._forward_hooks) for m in model.modules()] for model in (student, warm)]
    assert hooks[0] == hooks[1]
