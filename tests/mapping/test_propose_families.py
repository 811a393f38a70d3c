"""``match`` against an oracle that others wrote from the models' sources."""

import pytest
import torch
import transformers as hf
from torch import nn

import fxdistill
from architectures import ARCHITECTURES
from fxdistill.models.landmarks import embedding_of, logits_module_of, norms_of
from fxdistill.models.structure import stacks_of


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_block_mixer_and_mlp_is_found(name: str, layers: int) -> None:
    architecture = ARCHITECTURES[name]
    with torch.device("meta"):
        model = architecture.build(layers)
    found, expected = stacks_of(model), architecture.expected(layers)
    assert [[b.path for b in s.blocks] for s in found] == [s.blocks for s in expected]
    assert [[sorted(p.path for p in b.of("mixer")) for b in s.blocks] for s in found] == [
        [sorted(m) for m in s.mixers] for s in expected
    ]
    assert [[[p.path for p in b.of("mlp")] for b in s.blocks] for s in found] == [
        s.mlps for s in expected
    ]
    assert norms_of(model, found) == [s.norm for s in expected]
    assert logits_module_of(model, found) == architecture.logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_embedding_is_found(name: str) -> None:
    # Not on meta: tied weights are told by their identity.
    model = ARCHITECTURES[name].build(2)
    assert embedding_of(model, stacks_of(model)) == ARCHITECTURES[name].embedding


def parts(model: nn.Module) -> list[tuple[str, str]]:
    """`(path in the block, role)` of the first block of every stack."""
    return [
        (part.path.removeprefix(f"{stack.blocks[0].path}."), part.role)
        for stack in stacks_of(model)
        for part in stack.blocks[0].parts
    ]


def test_attention_that_holds_a_convolution_is_attention() -> None:
    sizes = {"depths": [1, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2]}
    stages = {"num_encoder_blocks": 2, "sr_ratios": [2, 1], "mlp_ratios": [2, 2]}
    kernels = {"patch_sizes": [3, 3], "strides": [2, 2]}
    config = hf.SegformerConfig(**sizes, **stages, **kernels)
    found = parts(hf.SegformerForImageClassification(config))
    assert [role for _, role in found] == ["mixer", "mlp"] * 2
    assert [path.split(".")[0] for path, _ in found] == ["attention", "mlp"] * 2


def test_vectors_that_mix_in_time_are_no_experts() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "attention_hidden_size": 16}
    model = hf.RwkvForCausalLM(hf.RwkvConfig(**sizes, intermediate_size=32, num_hidden_layers=2))
    assert ("attention", "mixer") in parts(model)
    assert ("feed_forward", "mlp") in parts(model)


class Lone(nn.Module):
    """A block whose mixer is a single convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(8), nn.Conv1d(8, 8, 3, groups=8)
        self.channels = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))


def test_a_lone_convolution_is_a_mixer() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.ModuleList([Lone(), Lone()]))
    assert parts(model) == [("mix", "mixer"), ("channels", "mlp")]


def test_parametrised_weights_are_weights() -> None:
    model = ARCHITECTURES["LlamaForCausalLM"].build(2)
    for layer in model.model.layers:
        nn.utils.parametrizations.weight_norm(layer.mlp.down_proj)
    assert ("mlp", "mlp") in parts(model)


def test_a_proposal_can_be_added_to_in_a_list() -> None:
    student, teacher = (ARCHITECTURES["LlamaForCausalLM"].build(n) for n in (2, 4))
    proposed = fxdistill.match(student, teacher)
    both = fxdistill.resolve(student, teacher, [proposed, {"model.norm": "model.norm"}])
    assert list(both)[:-1] == list(proposed)
    assert both[-1].student == "model.norm"
