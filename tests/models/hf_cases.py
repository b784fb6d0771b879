"""Tiny random models of Hugging Face's families, by what is special in them."""

from __future__ import annotations

import torch
import transformers
from torch import nn

SHAPE = {"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"intermediate_size": 44, "max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 12}
GPT2 = {"vocab_size": 37, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3}
GPT2 |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)

CASES = {
    "gpt2": ("GPT2", GPT2),
    "gpt2, untied, exact gelu, narrow": (
        "GPT2",
        {**GPT2, "tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 10, "layer_norm_epsilon": 1e-3},
    ),
    "llama": ("Llama", {**SHAPE, "num_key_value_heads": 4}),
    "llama, gqa, tied": ("Llama", {**SHAPE, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama, mqa, biases": (
        "Llama",
        {**SHAPE, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "rope_theta": 100.0},
    ),
    "llama 3": (
        "Llama",
        {**SHAPE, "num_key_value_heads": 2, "rope_theta": 5e5, "rope_scaling": LLAMA3, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "llama, wide heads": ("Llama", {**SHAPE, "num_key_value_heads": 4, "head_dim": 10, "rms_norm_eps": 1e-2}),
    "qwen2": ("Qwen2", {**SHAPE, "num_key_value_heads": 2}),
    "qwen2, tied": ("Qwen2", {**SHAPE, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**SHAPE, "num_key_value_heads": 2, "head_dim": 8}),
    "qwen3, tied, biases": (
        "Qwen3",
        {**SHAPE, "num_key_value_heads": 1, "head_dim": 6, "attention_bias": True, "tie_word_embeddings": True},
    ),
}  # fmt: skip


def theirs(case: str, seed: int = 0) -> nn.Module:
    """The model of a case, every parameter random: norms and biases too, and large enough for blocks to matter."""
    family, values = CASES[case]
    config = getattr(transformers, f"{family}Config")(**values)
    heads = {"GPT2": "GPT2LMHeadModel"}
    model = getattr(transformers, heads.get(family, f"{family}ForCausalLM"))(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, 37, (2, 16), generator=torch.Generator().manual_seed(0))
