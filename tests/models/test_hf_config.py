"""Every key of a configuration is translated or refused by name."""

from __future__ import annotations

import builtins
from dataclasses import replace

import pytest
import transformers
from hf_cases import CASES, SHAPE

from qtrain.models import hf_config
from qtrain.models.decoder import DecoderConfig, Llama3RopeScaling
from qtrain.models.gpt import GPTConfig
from qtrain.models.llama import LlamaConfig

# What neither side must lose. Of ours: all but these, which the other side does not have
NOT_THEIRS = {"init_from": None, "init_std": 0.02}


def config_of(case):
    family, values = CASES[case]
    return getattr(transformers, f"{family}Config")(**values)


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case):
    theirs = config_of(case)
    ours = hf_config.from_huggingface(theirs)
    back = hf_config.to_huggingface(ours)
    assert type(back) is type(theirs)
    kept = {
        "bos_token_id",
        "eos_token_id",
        "dtype",
        "sliding_window",
        "max_window_layers",
        "head_dim",
        "n_inner",
    }
    one, two = theirs.to_dict(), back.to_dict()
    assert {k for k in one if k not in kept and one[k] != two.get(k)} == set()
    assert hf_config.from_huggingface(back) == ours


def test_what_the_fields_become():
    ours = hf_config.from_huggingface(config_of("llama 3"))
    scaling = Llama3RopeScaling(
        factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_sequence_tokens=12
    )
    assert ours == LlamaConfig(
        vocab_size=37,
        sequence_tokens=16,
        layers=2,
        heads=4,
        width=24,
        mlp_width=44,
        kv_heads=2,
        norm_eps=1e-6,
        activation="gelu_tanh",
        rope_base=5e5,
        rope_scaling=scaling,
    )
    assert hf_config.from_huggingface(config_of("gpt2")) == GPTConfig(
        vocab_size=37,
        sequence_tokens=16,
        layers=2,
        heads=3,
        width=24,
        norm="layernorm",
        activation="gelu_tanh",
        positions="learned",
        bias=True,
        tie_embeddings=True,
    )
    assert hf_config.from_huggingface(config_of("qwen2")).qkv_bias
    assert hf_config.from_huggingface(config_of("qwen3")).qk_norm


def test_the_keys_of_transformers_4():
    """There the base of the rotary embedding, and its scaling, are keys of their own."""

    class Old:
        model_type = "llama"

        def __init__(self, **more):
            self.values = {
                **SHAPE,
                "rms_norm_eps": 1e-5,
                "is_llama_config": True,
                "rope_interleaved": False,
                **more,
            }

        def to_dict(self):
            return dict(self.values)

    assert hf_config.from_huggingface(Old(rope_theta=7.0, rope_scaling=None)).rope_base == 7.0
    scaled = {"type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled["original_max_position_embeddings"] = 8
    ours = hf_config.from_huggingface(Old(rope_theta=7.0, rope_scaling=scaled))
    assert (ours.rope_base, ours.rope_scaling.factor) == (7.0, 2.0)
    with pytest.raises(ValueError, match="rope_interleaved=True"):
        hf_config.from_huggingface(Old(rope_interleaved=True))


@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear': .*'default' and 'llama3'"),
        ("Llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
        ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ("Llama", {"hidden_act": "tanh"}, "hidden_act='tanh' of the Hugging Face configuration: .*'silu', "),
        ("Llama", {"attention_dropout": 0.1}, r"attention_dropout=0\.1"),
        ("Llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
        ("Llama", {"residual_multiplier": 0.22}, r"residual_multiplier=0\.22 .* nothing that qtrain's models have"),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window=True"),
        ("Qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.*sliding_attention"),
        ("Mistral", {}, "model_type='mistral': .* cover gpt2, llama, qwen2, qwen3"),
        ("GPT2", {"activation_function": "tanh"}, "activation_function='tanh'"),
        ("GPT2", {"attn_pdrop": 0.0}, "one dropout for all three"),
        ("GPT2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
        ("GPT2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("GPT2", {"add_cross_attention": True}, "add_cross_attention=True"),
    ],
)  # fmt: skip
def test_what_ours_cannot_represent_is_refused(family, more, message):
    shape = {} if family == "GPT2" else SHAPE
    with pytest.raises(hf_config.Untranslatable, match=message):
        hf_config.from_huggingface(getattr(transformers, f"{family}Config")(**{**shape, **more}))


LLAMA = LlamaConfig(vocab_size=37, sequence_tokens=16, layers=2, heads=4, width=24, mlp_width=44)
GPT = GPTConfig(vocab_size=37, sequence_tokens=16, layers=2, heads=4, width=24)


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (replace(LLAMA, sub_norm=True), "sub_norm=True"),
        (replace(LLAMA, qk_norm=True, mlp_bias=True), "Qwen3, .* has mlp_bias=True"),
        (replace(LLAMA, qk_norm=True, qkv_bias=True), "qkv_bias=True, o_bias=False"),
        (replace(LLAMA, o_bias=True), "Qwen2, which has qkv_bias alone"),
        (replace(LLAMA, qkv_bias=True, mlp_bias=True), "mlp_bias=True"),
        (GPT, "GPT-2 has .*, this model .*'rmsnorm'"),
        (
            DecoderConfig(vocab_size=2, sequence_tokens=2, layers=1, heads=1, width=2),
            "DecoderConfig: exported are",
        ),
    ],
)
def test_what_theirs_cannot_represent_is_refused(ours, message):
    with pytest.raises(hf_config.Untranslatable, match=message):
        hf_config.to_huggingface(ours)


def test_the_document_s_end_begins_and_ends_a_text():
    theirs = hf_config.to_huggingface(LLAMA, eot_token=36)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (36, 36, None)


def test_without_transformers_the_remedy_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "transformers":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'qtrain\[hf\]'"):
        hf_config.to_huggingface(LLAMA)
