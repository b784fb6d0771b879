"""Llama and its kin by configuration: RMSNorm, rotary positions, gated MLP, grouped key-value heads.

    mlp(x) = down(act(gate(x)) * up(x))                                  (SwiGLU with silu: Shazeer, 2002.05202)

Llama 1 to 3 (2302.13971, 2307.09288, 2407.21783) by shape, base and scaling of the rotary embedding; Qwen2 (2407.10671)
with ``qkv_bias``; Qwen3 (2505.09388) with ``qk_norm``; the BitNet b1.58 layout (2504.12285) with ``sub_norm`` and relu2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .decoder import (
    ACTIVATIONS,
    Activation,
    Attention,
    Block,
    Decoder,
    DecoderConfig,
    Llama3RopeScaling,
    Norm,
    Rope,
    normalise,
)


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """Shape and variant of a ``Llama``; checked when it is made.

    kv_heads: None means as many as heads. head_width: None means width / heads. rope_base: wavelengths run from 2 pi
    to 2 pi * rope_base tokens. o_bias, qkv_bias, mlp_bias: of those projections; lm_head and norms have none. sub_norm:
    an RMSNorm in front of ``attn.o`` and of ``mlp.down``. The rest: ``DecoderConfig``.
    """

    mlp_width: int
    kv_heads: int | None = None
    head_width: int | None = None
    activation: str = "silu"
    rope_base: float = 10_000.0
    rope_scaling: Llama3RopeScaling | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sub_norm: bool = False

    def __post_init__(self) -> None:
        self._check(counts=("mlp_width",), positive=("rope_base",))
        self._check_choice("activation", tuple(ACTIVATIONS))
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.head_width is None:
            if self.width % self.heads:
                raise ValueError(
                    f"width {self.width} is not divisible by heads {self.heads}; choose heads that divide it, or give "
                    "head_width"
                )
            object.__setattr__(self, "head_width", self.width // self.heads)
        self._check(counts=("kv_heads", "head_width"), positive=())
        assert self.kv_heads is not None
        assert self.head_width is not None
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads {self.heads} are not divisible by kv_heads {self.kv_heads}; each key-value head serves the same "
                "number of heads"
            )
        if self.head_width % 2:
            raise ValueError(
                f"rope rotates pairs, so head_width {self.head_width} must be even; change heads"
            )
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, Llama3RopeScaling):
            raise ValueError(
                f"rope_scaling {self.rope_scaling!r}: must be None or a mapping with _target_: "
                "qtrain.models.decoder.Llama3RopeScaling"
            )

    def make_norm(self, width: int) -> Norm:
        return nn.RMSNorm(width, eps=self.norm_eps)

    def build(self, *, seed: int, pretrained: bool = True) -> Llama:
        """The model with its initial weights; see ``ModelConfig.build``."""
        return self._started(Llama(self, seed=seed), pretrained)


class GatedMLP(nn.Module):
    """[B, S, C] -> [B, S, mlp_width] -> [B, S, C]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.up = nn.Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.mlp_bias)
        self.sub_norm = config.make_norm(config.mlp_width) if config.sub_norm else None
        self.activation = Activation(config.activation)
        self.read_by = {} if config.sub_norm else {"activation": "down"}

    def forward(self, x: Tensor) -> Tensor:
        return self.down(normalise(self.sub_norm, self.activation(self.gate(x), self.up(x))))


class Llama(Decoder):
    """tokens [B, S] int64, S <= sequence_tokens -> logits [B, S, V]; see ``Decoder``."""

    config: LlamaConfig

    def __init__(self, config: LlamaConfig, *, seed: int = 0, activation_checkpointing: bool = False) -> None:
        kv_heads, head_width = config.kv_heads, config.head_width
        assert kv_heads is not None  # both are set by the config itself
        assert head_width is not None

        def block() -> Block:
            attention = Attention(
                config,
                kv_heads=kv_heads,
                head_width=head_width,
                norm=config.make_norm,
                qkv_bias=config.qkv_bias,
                o_bias=config.o_bias,
                sub_norm=config.sub_norm,
            )
            return Block(config.make_norm, attention, GatedMLP(config), dropout=0.0)

        super().__init__(
            config,
            block=block,
            norm=config.make_norm,
            rope=Rope(head_width, config.rope_base, config.rope_scaling),
            dropout=0.0,
            seed=seed,
            activation_checkpointing=activation_checkpointing,
        )
