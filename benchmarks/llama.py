"""The language models that the benchmarks train."""

import argparse

from transformers import LlamaConfig, LlamaForCausalLM


def llama(o: argparse.Namespace, width: int, layers: int) -> LlamaForCausalLM:
    """A Llama with tied embeddings and heads of 64, over ``o.vocabulary`` entries."""
    config = LlamaConfig(
        vocab_size=o.vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)
