"""Models of transformers that record hidden states or attentions, captured before they have run."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
)
from transformers import ViTForImageClassification as ViT

import fxdistill

AOT = {"backend": "aot_eager"}
IDS = torch.randint(4, 50, (2, 8), generator=torch.Generator().manual_seed(0))
PIXELS = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


def llama(layers, **options):
    torch.manual_seed(layers)
    sizes = {**SIZES, "vocab_size": 64, "num_hidden_layers": layers, "use_cache": False}
    return LlamaForCausalLM(LlamaConfig(**sizes, **options))


def bert(layers, **options):
    torch.manual_seed(layers)
    sizes = {**SIZES, "vocab_size": 64, "num_hidden_layers": layers, "use_cache": False}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(**sizes, **quiet, **options))


def vit(layers, **options):
    torch.manual_seed(layers)
    sizes = {**SIZES, "num_hidden_layers": layers, "image_size": 8, "patch_size": 4}
    return ViT(ViTConfig(**sizes, **options))


def llava(layers):
    """Its vision tower always records: it is asked for the hidden states of one layer."""
    torch.manual_seed(layers)
    vision = CLIPVisionConfig(**SIZES, num_hidden_layers=2, image_size=8, patch_size=4)
    text = LlamaConfig(**SIZES, vocab_size=64, num_hidden_layers=layers, use_cache=False)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=60)
    return LlavaForConditionalGeneration(config)


WITH_IMAGE = torch.cat([IDS[:, :2], torch.full((2, 4), 60), IDS[:, 2:]], 1)  # four patches
CASES = {
    "llava": (llava, {"input_ids": WITH_IMAGE, "pixel_values": PIXELS}, {}),
    "llama hidden states": (llama, {"input_ids": IDS}, {"output_hidden_states": True}),
    "llama attentions": (
        llama,
        {"input_ids": IDS},
        {"output_attentions": True, "attn_implementation": "eager"},
    ),
    "bert hidden states": (bert, {"input_ids": IDS}, {"output_hidden_states": True}),
    "vit hidden states": (
        vit,
        {"pixel_values": PIXELS},
        {"output_hidden_states": True},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_cold_model_is_captured_the_first_time(name):
    make, inputs, options = CASES[name]
    want = fxdistill.wrap(make(1, **options), make(2, **options).eval(), compile=False)
    made = fxdistill.wrap(make(1, **options), make(2, **options).eval(), compile=AOT)
    got = made(**inputs)
    torch.testing.assert_close(got.loss, want(**inputs).loss)
    got.loss.backward()


def test_a_keyword_of_the_call_asks_for_it():
    made = fxdistill.wrap(llama(1), llama(2), compile=AOT)
    made(input_ids=IDS, output_hidden_states=True).loss.backward()


@pytest.mark.parametrize("how", ["check", "report"])
def test_what_only_looks_works_on_cold_models(how):
    options = {"output_hidden_states": True}
    made = fxdistill.wrap(llama(1, **options), llama(2, **options), compile=AOT)
    found = getattr(made, how)(input_ids=IDS)
    assert getattr(found, "stopped", None) is None


def test_widths_are_read_from_cold_models():
    options = {"output_hidden_states": True}
    fxdistill.wrap(
        llama(1, **options),
        llama(2, **options),
        {"model.layers.0.mlp": fxdistill.Match(teacher="model.layers.1.mlp", project="linear")},
        compile=AOT,
        example_inputs={"input_ids": IDS},
    )


def test_a_model_that_records_nothing_gets_no_hooks():
    student = llama(1)
    fxdistill.wrap(student, llama(2), compile=AOT)(input_ids=IDS).loss.backward()
    assert not any(module._forward_hooks for module in student.modules())


def test_hooks_are_those_of_a_first_run():
    options = {"output_hidden_states": True}
    cold, warm = llama(1, **options), llama(1, **options)
    warm(input_ids=IDS)
    fxdistill.wrap(cold, llama(2), compile=AOT)(input_ids=IDS)
    counts = [[len(module._forward_hooks) for module in model.modules()] for model in (cold, warm)]
    assert counts[0] == counts[1]
