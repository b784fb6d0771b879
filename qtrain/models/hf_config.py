"""Configurations of Hugging Face's GPT-2, Llama, Qwen2 and Qwen3, and ours: each into the other.

Every key of theirs is either translated, known not to matter, or refused by name: a model that would compute something
else than its configuration says is never built.
"""

from __future__ import annotations

from typing import Any

from .decoder import DecoderConfig, Llama3RopeScaling
from .gpt import GPTConfig
from .llama import LlamaConfig

# Theirs -> ours; of those that mean the same the first is written
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
_LLAMA_LIKE = ("llama", "qwen2", "qwen3")
# Keys that change nothing of what a causal model computes from tokens
_WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
        "is_llama_config", "layer_types", "max_window_layers", "model_type", "n_ctx", "pad_token_id", "pretraining_tp",
        "sliding_window", "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
        "summary_use_proj", "task_specific_params", "torch_dtype", "transformers.js_config", "transformers_version",
        "use_cache",
    }
)  # fmt: skip


class Untranslatable(ValueError):
    """A configuration that the other side has no model for."""


def huggingface() -> Any:
    """The transformers library. Raises ImportError with the command that installs it."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "Hugging Face's model folders need transformers and safetensors: pip install 'qtrain[hf]'"
        ) from error
    return transformers


def _only(values: dict[str, Any], name: str, *allowed: Any) -> Any:
    """Takes ``name`` out of ``values``; the first of ``allowed`` where it is absent."""
    value = values.pop(name, allowed[0])
    if value not in allowed:
        shown = ", ".join(repr(a) for a in allowed)
        raise Untranslatable(
            f"{name}={value!r} of the Hugging Face configuration: qtrain's models have {shown}"
        )
    return value


def from_huggingface(theirs: Any) -> DecoderConfig:
    """Our configuration of the model that ``theirs``, a PretrainedConfig, describes.

    Raises Untranslatable (a ValueError), naming the key, for everything that our models cannot represent.
    """
    kind = theirs.model_type
    if kind != "gpt2" and kind not in _LLAMA_LIKE:
        raise Untranslatable(f"model_type={kind!r}: qtrain's own models cover gpt2, {', '.join(_LLAMA_LIKE)}")
    values = theirs.to_dict()
    ours = _gpt(values) if kind == "gpt2" else _llama(values, kind)
    defaults = huggingface().PretrainedConfig().to_dict()
    for name, value in values.items():
        if value and name not in _WITHOUT_EFFECT and value != defaults.get(name):
            raise Untranslatable(
                f"{name}={value!r} of the Hugging Face configuration is nothing that qtrain's models have; take the key "
                "out of config.json where it is known to change nothing"
            )
    return ours


def _gpt(values: dict[str, Any]) -> GPTConfig:
    dropouts = {name: values.pop(name, 0.1) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    if len(set(dropouts.values())) > 1:
        raise Untranslatable(f"{dropouts}: qtrain's GPT has one dropout for all three")
    _only(values, "scale_attn_weights", True)
    for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        _only(values, name, False)
    width = values.pop("n_embd")
    return GPTConfig(
        vocab_size=values.pop("vocab_size"),
        sequence_tokens=values.pop("n_positions"),
        layers=values.pop("n_layer"),
        heads=values.pop("n_head"),
        width=width,
        mlp_width=values.pop("n_inner", None) or 4 * width,
        norm="layernorm",
        norm_eps=values.pop("layer_norm_epsilon"),
        activation=_ACTIVATIONS[_only(values, "activation_function", "gelu_new", *_ACTIVATIONS)],
        positions="learned",
        bias=True,
        tie_embeddings=values.pop("tie_word_embeddings", True),
        dropout=dropouts["resid_pdrop"],
    )


def _llama(values: dict[str, Any], kind: str) -> LlamaConfig:
    _only(values, "attention_dropout", 0.0)
    _only(values, "use_sliding_window", False)
    _only(values, "rope_interleaved", False)
    if any(layer != "full_attention" for layer in values.get("layer_types") or ()):
        raise Untranslatable(
            f"layer_types={values['layer_types']}: qtrain's models have full_attention in every layer"
        )
    # Qwen2 has biases on q, k and v whatever its configuration says
    bias = bool(values.pop("attention_bias", False))
    base, scaling = _rope(values)
    return LlamaConfig(
        vocab_size=values.pop("vocab_size"),
        sequence_tokens=values.pop("max_position_embeddings"),
        layers=values.pop("num_hidden_layers"),
        heads=values.pop("num_attention_heads"),
        kv_heads=values.pop("num_key_value_heads", None),
        head_width=values.pop("head_dim", None),
        width=values.pop("hidden_size"),
        mlp_width=values.pop("intermediate_size"),
        norm_eps=values.pop("rms_norm_eps"),
        activation=_ACTIVATIONS[_only(values, "hidden_act", "silu", *_ACTIVATIONS)],
        rope_base=base,
        rope_scaling=scaling,
        qkv_bias=bias or kind == "qwen2",
        o_bias=bias and kind != "qwen2",
        mlp_bias=bool(values.pop("mlp_bias", False)),
        qk_norm=kind == "qwen3",
        tie_embeddings=bool(values.pop("tie_word_embeddings", False)),
    )


def _rope(values: dict[str, Any]) -> tuple[float, Llama3RopeScaling | None]:
    """From ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before)."""
    theta = values.pop("rope_theta", None)
    rope = dict(values.pop("rope_scaling", None) or {})
    rope |= dict(values.pop("rope_parameters", None) or {})
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    base = float(rope.pop("rope_theta", theta if theta is not None else 10_000.0))
    _only(rope, "partial_rotary_factor", 1.0, None)
    scaling = None
    if kind == "llama3":
        scaling = Llama3RopeScaling(
            factor=rope.pop("factor"),
            low_frequency_factor=rope.pop("low_freq_factor"),
            high_frequency_factor=rope.pop("high_freq_factor"),
            original_sequence_tokens=rope.pop("original_max_position_embeddings"),
        )
    elif kind != "default":
        raise Untranslatable(f"rope_type={kind!r}: qtrain's models have 'default' and 'llama3'")
    left = {name: value for name, value in rope.items() if value is not None and name != "type"}
    if left:
        raise Untranslatable(f"{left} of the rotary embedding: nothing that qtrain's models have")
    return base, scaling


def to_huggingface(ours: DecoderConfig, *, eot_token: int | None = None) -> Any:
    """The PretrainedConfig of the model that ``ours`` describes. eot_token: the id between documents, which begins and
    ends a text.

    Raises Untranslatable (a ValueError), naming the fields, where Hugging Face has no such model.
    """
    shared = {
        "vocab_size": ours.vocab_size,
        "tie_word_embeddings": ours.tie_embeddings,
        "initializer_range": ours.init_std,
        "bos_token_id": eot_token,
        "eos_token_id": eot_token,
        "pad_token_id": None,
    }
    if isinstance(ours, GPTConfig):
        return _to_gpt2(ours, shared)
    if isinstance(ours, LlamaConfig):
        return _to_llama(ours, shared)
    raise Untranslatable(f"{type(ours).__name__}: exported are GPTConfig and LlamaConfig")


def _to_gpt2(ours: GPTConfig, shared: dict[str, Any]) -> Any:
    wanted = {"norm": "layernorm", "positions": "learned", "bias": True, "qk_norm": False}
    found = {name: getattr(ours, name) for name in wanted}
    if found != wanted:
        raise Untranslatable(f"Hugging Face's GPT-2 has {wanted}, this model {found}")
    names = {v: k for k, v in _ACTIVATIONS.items()}  # the last: gelu_new is GPT-2's own
    return huggingface().GPT2Config(
        **shared,
        n_positions=ours.sequence_tokens,
        n_embd=ours.width,
        n_layer=ours.layers,
        n_head=ours.heads,
        n_inner=ours.mlp_width,
        activation_function=names[ours.activation] if ours.activation != "silu" else "silu",
        layer_norm_epsilon=ours.norm_eps,
        resid_pdrop=ours.dropout,
        embd_pdrop=ours.dropout,
        attn_pdrop=ours.dropout,
    )


def _to_llama(ours: LlamaConfig, shared: dict[str, Any]) -> Any:
    kind = _llama_kind(ours)
    scaling = ours.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": ours.rope_base}
    if scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_sequence_tokens,
        }
    more = {} if kind == "Qwen2Config" else {"attention_bias": ours.qkv_bias}
    if kind == "LlamaConfig":
        more["mlp_bias"] = ours.mlp_bias
    names = {v: k for k, v in reversed(_ACTIVATIONS.items())}
    return getattr(huggingface(), kind)(
        **shared,
        **more,
        hidden_size=ours.width,
        intermediate_size=ours.mlp_width,
        num_hidden_layers=ours.layers,
        num_attention_heads=ours.heads,
        num_key_value_heads=ours.kv_heads,
        head_dim=ours.head_width,
        hidden_act=names[ours.activation],
        max_position_embeddings=ours.sequence_tokens,
        rms_norm_eps=ours.norm_eps,
        # Before transformers 5 the base is a key of its own, and the kind "default" no scaling
        rope_theta=ours.rope_base,
        rope_scaling=rope if scaling is not None else None,
    )


def _llama_kind(ours: LlamaConfig) -> str:
    """The configuration class of the family member that has these options."""
    if ours.sub_norm:
        raise Untranslatable("sub_norm=True: Hugging Face's Llama, Qwen2 and Qwen3 have no such norms")
    if ours.qk_norm:
        if ours.mlp_bias or ours.qkv_bias != ours.o_bias:
            raise Untranslatable(
                f"qk_norm=True is Qwen3, which has no mlp_bias, and qkv_bias and o_bias alike; this model has mlp_bias="
                f"{ours.mlp_bias}, qkv_bias={ours.qkv_bias}, o_bias={ours.o_bias}"
            )
        return "Qwen3Config"
    if ours.qkv_bias == ours.o_bias:
        return "LlamaConfig"
    if ours.o_bias or ours.mlp_bias:
        raise Untranslatable(
            "qkv_bias and o_bias that differ are Qwen2, which has qkv_bias alone; this model has "
            f"qkv_bias={ours.qkv_bias}, o_bias={ours.o_bias}, mlp_bias={ours.mlp_bias}"
        )
    return "Qwen2Config"
