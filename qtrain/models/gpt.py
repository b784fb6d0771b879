"""GPT-2 and its variants by configuration: one MLP, one head width, equal numbers of query and key-value heads.

    mlp(x) = down(act(up(x)))

Norm, positions, activation, biases and tying are choices; GPT-2's are LayerNorm, learned, gelu_tanh, all, tied.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .decoder import ACTIVATIONS, Activation, Attention, Block, Decoder, DecoderConfig, Norm, Rope

NORMS = ("rmsnorm", "layernorm")
POSITIONS = ("learned", "rope")


@dataclass(frozen=True, kw_only=True)
class GPTConfig(DecoderConfig):
    """Shape and variant of a ``GPT``; checked when it is made.

    ``mlp_width``: None means 4 * width. ``bias``: of all projections and of LayerNorm (lm_head has none).
    ``rope_base``: wavelengths run from 2 pi to 2 pi * rope_base tokens. The rest: ``DecoderConfig``.
    """

    mlp_width: int | None = None
    norm: str = "rmsnorm"
    activation: str = "gelu"
    positions: str = "rope"
    rope_base: float = 10_000.0
    bias: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.mlp_width is None and isinstance(self.width, int):
            object.__setattr__(self, "mlp_width", 4 * self.width)
        self._check(counts=("mlp_width",), positive=("rope_base",))
        self._check_choice("norm", NORMS)
        self._check_choice("activation", tuple(ACTIVATIONS))
        self._check_choice("positions", POSITIONS)
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not divisible by heads {self.heads}; choose heads that divide it"
            )
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(
                f"rope rotates pairs, so width / heads = {self.head_width} must be even; change heads, or set "
                "positions='learned'"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout {self.dropout} must lie in [0, 1); 0 turns it off")

    @property
    def head_width(self) -> int:
        """D = width / heads."""
        return self.width // self.heads

    def make_norm(self, width: int) -> Norm:
        if self.norm == "rmsnorm":
            return nn.RMSNorm(width, eps=self.norm_eps)
        return nn.LayerNorm(width, eps=self.norm_eps, bias=self.bias)

    def build(self, *, seed: int, pretrained: bool = True) -> GPT:
        """The model with its initial weights; see ``ModelConfig.build``."""
        return self._started(GPT(self, seed=seed), pretrained)


class MLP(nn.Module):
    """[B, S, C] -> [B, S, mlp_width] -> [B, S, C]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.mlp_width is not None  # set by the config itself
        self.up = nn.Linear(config.width, config.mlp_width, bias=config.bias)
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.bias)
        self.activation = Activation(config.activation)
        self.read_by = {"activation": "down"}

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class GPT(Decoder):
    """tokens [B, S] int64, S <= sequence_tokens -> logits [B, S, V]; see ``Decoder``."""

    config: GPTConfig

    def __init__(self, config: GPTConfig, *, seed: int = 0, activation_checkpointing: bool = False) -> None:
        def block() -> Block:
            attention = Attention(
                config,
                kv_heads=config.heads,
                head_width=config.head_width,
                norm=config.make_norm,
                qkv_bias=config.bias,
                o_bias=config.bias,
                dropout=config.dropout,
            )
            return Block(config.make_norm, attention, MLP(config), config.dropout)

        super().__init__(
            config,
            block=block,
            norm=config.make_norm,
            rope=Rope(config.head_width, config.rope_base) if config.positions == "rope" else None,
            dropout=config.dropout,
            seed=seed,
            activation_checkpointing=activation_checkpointing,
        )
