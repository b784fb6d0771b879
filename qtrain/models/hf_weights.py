"""Weights under Hugging Face's names and layout, and under ours: each into the other, bit by bit.

Llama, Qwen2 and Qwen3 differ from ours in names alone: their rotary embedding pairs (i, i + D/2) as ours does, so no
rows are permuted. GPT-2 holds q, k and v in one matrix, and its matrices as [I, O].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .decoder import DecoderConfig
from .gpt import GPTConfig
from .llama import LlamaConfig

# Ours -> theirs; of a block's, what stands behind its number
_LLAMA = {
    "token_embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "blocks": "model.layers",
    "attn_norm": "input_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_GPT2 = {
    "token_embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "blocks": "transformer.h",
    "attn_norm": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.o": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
# Buffers that older files hold: causal masks, and frequencies that follow from the configuration
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def _names(config: DecoderConfig) -> dict[str, str]:
    if isinstance(config, LlamaConfig):
        return _LLAMA
    if isinstance(config, GPTConfig):
        return _GPT2
    raise ValueError(
        f"{type(config).__name__}: weights are converted for GPTConfig and LlamaConfig; other models keep their own"
    )


def _renamed(name: str, names: Mapping[str, str], blocks: tuple[str, str]) -> str | None:
    """``name`` on the other side; None where there is no such name. blocks: what begins a block's name, here and
    there."""
    here, there = blocks
    module, _, kind = name.rpartition(".")
    if module.startswith(f"{here}."):
        number, _, part = module.removeprefix(f"{here}.").partition(".")
        return f"{there}.{number}.{names[part]}.{kind}" if number.isdigit() and part in names else None
    return f"{names[module]}.{kind}" if module in names else None


def _transposed(ours: str) -> bool:
    """Whether GPT-2 holds this parameter, under our name, as [I, O]."""
    return ours.startswith("blocks.") and ours.endswith(
        ("attn.qkv.weight", "attn.o.weight", "mlp.up.weight", "mlp.down.weight")
    )


def to_huggingface(config: DecoderConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` of our model as the state of theirs: contiguous, in the same dtypes, without a tied lm_head.

    Raises ValueError for a tensor that has no place there, such as the state of a quantizer.
    """
    names = _names(config)
    held = {n: t for n, t in state.items() if not (n == "lm_head.weight" and config.tie_embeddings)}
    if isinstance(config, GPTConfig):
        held = _fused(held, config.layers)
    found = {}
    for name, tensor in held.items():
        theirs = _renamed(name, names, ("blocks", names["blocks"]))
        if theirs is None:
            raise ValueError(f"{name}: Hugging Face's model has no such tensor")
        turned = isinstance(config, GPTConfig) and _transposed(name)
        found[theirs] = (tensor.T if turned else tensor).detach().contiguous()
    return found


def _fused(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """q, k and v of every block under one another."""
    found = dict(state)
    for i in range(layers):
        for kind in ("weight", "bias"):
            parts = [found.pop(f"blocks.{i}.attn.{part}.{kind}") for part in "qkv"]
            found[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    return found


def from_huggingface(config: DecoderConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of our model, in the dtypes of ``tensors``; a tied lm_head is the embedding itself.

    Raises ValueError for tensors that are unknown, and for a head that should be tied and differs. What lacks is found by
    ``load_state_dict``.
    """
    names = {theirs: ours for ours, theirs in _names(config).items()}
    gpt = isinstance(config, GPTConfig)
    begins = "transformer.h" if gpt else "model.layers"
    if gpt and not any(name.startswith("transformer.") for name in tensors):  # GPT2Model's, without a head
        tensors = {n if n.startswith("lm_head") else f"transformer.{n}": t for n, t in tensors.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(_BUFFERS):
            continue
        ours = _renamed(name, names, (begins, "blocks"))
        if ours is None:
            raise ValueError(
                f"{name} {list(tensor.shape)}: qtrain's {type(config).__name__} has no such tensor"
            )
        tensor = tensor.T if gpt and _transposed(ours) else tensor
        if gpt and ".attn.qkv." in ours:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                found[ours.replace("qkv", part)] = piece.contiguous()
        else:
            found[ours] = tensor.contiguous()
    if config.tie_embeddings and "token_embedding.weight" in found:
        embedding = found["token_embedding.weight"]
        if not torch.equal(found.get("lm_head.weight", embedding), embedding):
            raise ValueError("tie_word_embeddings is true, and the file has a head that is not the embedding")
        found["lm_head.weight"] = embedding
    return found
