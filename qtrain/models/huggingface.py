"""Causal language models of Hugging Face's transformers, trained like ours: from an architecture, or from weights.

    model=huggingface model.config.model_type=llama model.config.num_hidden_layers=4     an architecture by its name
    model=huggingface model.path=FOLDER_OR_HUB_NAME                                     that of a config.json
    model=huggingface model.path=FOLDER_OR_HUB_NAME model.pretrained=true               its weights as well

The model is transformers' own module: its class gets another ``forward`` (tokens -> logits) in front, so that its
layers, parameters and checkpoint keys have the names that the rest of the world knows (``model.layers.0.mlp.up_proj``,
``transformer.h.0.attn.c_attn``, ``lm_head``). Attention is scaled_dot_product_attention, and there is no cache. Code
from a hub is never run, and weights are read from safetensors alone.

B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

ATTENTIONS = ("sdpa", "eager")
# Set by keys of our own, with these names
_OURS = {"vocab_size": "model.vocab_size", "max_position_embeddings": "model.sequence_tokens"}
# Its tokens are the tokenizer's that was trained, not the ones of the config: a padding token's embedding gets no gradient
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError("model=huggingface needs transformers: pip install 'qtrain[hf]'") from error
    return transformers


@dataclass(frozen=True, kw_only=True)
class HuggingFaceConfig:
    """Which architecture, from where, and for what vocabulary and context; checked when it is made.

    path: a folder with a config.json, or a name on the hub. config: values of that architecture to change, by the names
    of its configuration class; or, with ``model_type`` among them, a whole architecture without a path. A value of None
    is left as it is. pretrained: start from the weights at ``path``.
    vocab_size: V; None only with pretrained weights, which bring their own: a given one must not exceed it.
    sequence_tokens: the longest sequence. A model from scratch is built for it (``max_position_embeddings``, unless its
    rotary embedding is scaled); pretrained weights must reach it. attention: ``sdpa`` or ``eager``.
    architecture: the whole configuration, in the place of path and config: what a run writes down.

    Raises ValueError, naming the value and the remedy, also where transformers is not installed.
    """

    path: str | None = None
    pretrained: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    vocab_size: int | None = None
    sequence_tokens: int = 256
    attention: str = "sdpa"
    architecture: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.attention not in ATTENTIONS:
            raise ValueError(f"model.attention={self.attention!r}: allowed are {', '.join(ATTENTIONS)}")
        if self.pretrained and self.path is None:
            raise ValueError("model.pretrained=true without weights: give model.path=FOLDER_OR_HUB_NAME")
        if self.architecture is None:
            object.__setattr__(self, "architecture", self._described())
        _check_causal(self._hf_config())
        try:
            with torch.device("meta"):  # allocates nothing
                self._module(_drawn)
        except ValueError as error:
            remedy = "; model.attention=eager may help" if "attn_implementation" in str(error) else ""
            raise ValueError(f"transformers refuses this architecture{remedy}: {error}") from error

    def _described(self) -> dict[str, Any]:
        """The architecture as plain containers, out of path and config."""
        changes = {str(k): v for k, v in self.config.items() if v is not None}
        if self.path is None:
            if "model_type" not in changes:
                raise ValueError(
                    "no architecture: give model.path=FOLDER_OR_HUB_NAME, or model.config.model_type=llama (or gpt2, "
                    "qwen3, ...) and what differs from its defaults"
                )
            found: dict[str, Any] = {}
        else:
            if "model_type" in changes:
                raise ValueError(
                    f"model.config.model_type beside model.path={self.path}: give one of the two"
                )
            found = _config_json(self.path)
        config = _merged(found, changes)
        self._fit(config)
        described = json.loads(json.dumps(config.to_dict()))
        # Who wrote it and where it lay changes no model
        return {k: v for k, v in described.items() if k not in ("transformers_version", "_name_or_path")}

    def _fit(self, config: Any) -> None:
        """The vocabulary and the context, into ``config`` or checked against it."""
        if self.pretrained:
            if (self.vocab_size or 0) > config.vocab_size:
                raise ValueError(
                    f"the weights at model.path={self.path} are for {config.vocab_size} ids and the tokenizer has "
                    f"{self.vocab_size}; take the tokenizer they were trained with, or model.pretrained=false"
                )
            longest = getattr(config, "max_position_embeddings", None)
            if longest is not None and self.sequence_tokens > longest:
                raise ValueError(
                    f"model.sequence_tokens={self.sequence_tokens} exceeds the {longest} positions of the weights at "
                    f"model.path={self.path}; shorten it"
                )
        else:
            if self.vocab_size is None:
                raise ValueError("vocab_size=None: a model without pretrained weights needs the tokenizer's")
            config.vocab_size = self.vocab_size
            for name in _TOKENS:
                setattr(config, name, None)
            scaled = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") != "default"
            if hasattr(config, "max_position_embeddings") and not scaled:
                config.max_position_embeddings = self.sequence_tokens
        object.__setattr__(self, "vocab_size", config.vocab_size)

    def _hf_config(self) -> Any:
        assert self.architecture is not None
        values = dict(self.architecture)
        config = _checked(values.pop("model_type"), values)
        config.use_cache = False
        return config

    def plain(self) -> dict[str, Any]:
        """This configuration as plain containers that need no other file, but for pretrained weights."""
        return {
            "_target_": f"{type(self).__module__}.{type(self).__name__}",
            "path": self.path if self.pretrained else None,
            "pretrained": self.pretrained,
            "config": {},
            "vocab_size": self.vocab_size,
            "sequence_tokens": self.sequence_tokens,
            "attention": self.attention,
            "architecture": dict(self.architecture or {}),
        }

    def build(self, *, seed: int, pretrained: bool = True) -> Any:
        """The model; its parameters are float32. Without pretrained weights they are drawn on the CPU, by the
        architecture's own rules. Raises ValueError where weights do not fit the architecture one by one."""
        device = torch.get_default_device()
        reads = self.pretrained and pretrained
        drawn_on = torch.device("meta" if device.type == "meta" else "cpu")
        with torch.random.fork_rng(devices=[]), drawn_on:
            torch.default_generator.manual_seed(seed)
            model = self._module(partial(_loaded, self.path) if reads else _drawn)
        kind = type(model)
        model.__class__ = type(kind.__name__, (TokensToLogits, kind), {"__module__": __name__})
        model.longest = self.sequence_tokens
        return model.to(device).train()

    def _module(self, make: Callable[..., Any]) -> Any:
        more = {"attn_implementation": self.attention, "dtype": torch.float32}
        return make(_transformers().AutoModelForCausalLM, self._hf_config(), more)


class TokensToLogits(nn.Module):
    """In front of a class of transformers' causal language models."""

    longest: int
    recomputes = False

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, S] int64, S <= sequence_tokens -> logits [B, S, V]."""
        if tokens.shape[1] > self.longest:
            raise ValueError(
                f"{tokens.shape[1]} tokens exceed the model's sequence_tokens {self.longest}; crop the input or build "
                "the model for longer sequences"
            )
        return super().forward(input_ids=tokens, use_cache=False).logits  # type: ignore[misc]

    def repeated_blocks(self) -> list[nn.Module]:
        """The list of modules that holds most of the parameters."""
        lists = [m for m in self.modules() if isinstance(m, nn.ModuleList)]
        if not lists:
            raise ValueError(
                f"{type(self).__name__} has no list of blocks: it cannot be sharded block by block"
            )
        sizes = [sum(p.numel() for p in blocks.parameters()) for blocks in lists]
        return list(lists[sizes.index(max(sizes))])

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute each block's activations in the backward pass. Raises ValueError for an architecture that cannot."""
        model: Any = self
        if enabled and not model.supports_gradient_checkpointing:
            raise ValueError(f"activation_checkpointing=true: {type(self).__name__} does not support it")
        word = (
            "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        )  # as it was called
        if enabled:
            enable = getattr(model, f"{word}_checkpointing_enable")
            enable(**{f"{word}_checkpointing_kwargs": {"use_reentrant": False}})
        elif self.recomputes:
            getattr(model, f"{word}_checkpointing_disable")()
        self.recomputes = enabled


def _config_json(path: str) -> dict[str, Any]:
    try:
        found, _ = _transformers().PreTrainedConfig.get_config_dict(path)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.path={path}: {first} It must be a folder with a config.json, or a name on the hub that can be reached"
        ) from error
    if "model_type" not in found:
        raise ValueError(f"model.path={path}: there is no config.json in it that names a model_type")
    return found


def _merged(found: dict[str, Any], changes: dict[str, Any]) -> Any:
    """The configuration object of ``found`` with ``changes``, from which what follows from them is derived anew.
    Raises ValueError for a key that the architecture does not know."""
    values = dict(found)
    model_type = changes.pop("model_type", None) or values.pop("model_type")
    kind = type(_checked(model_type, {}))
    known = {*kind().to_dict(), *kind.attribute_map}
    ours = {kind.attribute_map.get(theirs, theirs): key for theirs, key in _OURS.items()}
    for key, value in changes.items():
        if (name := kind.attribute_map.get(key, key)) in ours:
            raise ValueError(f"model.config.{key}={value!r}: say it as {ours[name]}={value!r}")
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=3)
            meant = f"did you mean {' or '.join(near)}?" if near else f"it knows {', '.join(sorted(known))}"
            raise ValueError(f"model.config.{key}: {kind.__name__} has no such value; {meant}")
        values[name] = value
    return _checked(model_type, values)


def _checked(model_type: str, values: dict[str, Any]) -> Any:
    """The configuration object of those values; its own complaints as ValueError."""
    auto = _transformers().AutoConfig
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()), n=3)
        meant = f"; did you mean {' or '.join(near)}?" if near else ", such as llama, gpt2 or qwen3"
        raise ValueError(f"model_type {model_type!r} is no architecture that transformers knows{meant}")
    try:
        return auto.for_model(model_type, **values)
    except (StrictDataclassError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"the configuration of {model_type} does not hold together: {text}") from error


def _check_causal(config: Any) -> None:
    """Raises ValueError for what transformers would build and what is no decoder of text."""
    _transformers()
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
    )

    name = config.model_type
    if config.is_encoder_decoder or name in MASKED or name not in CAUSAL:
        raise ValueError(
            f"model_type {name!r} is no decoder-only language model; take one such as llama, gpt2 or qwen3"
        )
    heads, shared = (
        getattr(config, "num_attention_heads", 1),
        getattr(config, "num_key_value_heads", None) or 1,
    )
    if (
        isinstance(heads, int) and heads % shared
    ):  # transformers does not look, and fails in the first forward
        raise ValueError(
            f"num_key_value_heads={shared} does not divide num_attention_heads={heads}: set both in model.config"
        )
    if config.get_text_config() is not config:
        raise ValueError(
            f"model_type {name!r} reads more than text; take its text architecture, such as {name}_text"
        )


def _drawn(auto: Any, config: Any, more: dict[str, Any]) -> Any:
    return auto.from_config(config, **more)


def _loaded(path: str | None, auto: Any, config: Any, more: dict[str, Any]) -> Any:
    """The weights at ``path``; each parameter of the architecture must have its own there, and none be left over."""
    try:
        model, report = auto.from_pretrained(
            path,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **more,
        )
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.path={path}: {first} model.pretrained=true reads safetensors there"
        ) from error
    for key, what in (
        ("missing_keys", "are not there"),
        ("mismatched_keys", "have another shape"),
        ("unexpected_keys", "are left over"),
    ):
        if report[key]:
            shown = ", ".join(sorted(str(k[0] if isinstance(k, tuple) else k) for k in report[key])[:5])
            raise ValueError(
                f"the weights at model.path={path} do not fit the architecture: {shown} {what}; do not change its shape "
                "with model.config, or train from scratch (model.pretrained=false)"
            )
    return model
