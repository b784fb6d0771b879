"""A plain pre-norm decoder, GPT-2 to modern variants by configuration, that knows nothing of quantization.

    x = embed(tokens) [+ position_embedding]
    for each block:  x = x + attn.o(attention(attn.q, attn.k, attn.v of norm(x)))
                     x = x + mlp.down(act(mlp.up(norm(x))))
    logits = lm_head(norm(x))

Every projection is an ``nn.Linear`` of its own (``blocks.3.attn.q``, ``blocks.3.mlp.down``), so that a rule can
name it; a fused qkv would force one precision on three matrices whose sensitivities differ. What attention
really multiplies passes through named identities: ``attn.q_rope`` and ``attn.k_rope`` (query and key after
rotary embedding, or without one after projection and norm) and ``attn.v_hook``, each [B, H, S, D].
``attn.logits_hook`` is None; a module set there receives the scaled causal logits [B, H, S, S], and attention
then takes the explicit path, since the fused kernel never forms them.

Initial weights depend on the seed and on each parameter's own name: the same seed gives the same model on
every device, a variant with one matrix more leaves the others as they were, and torch's global generator is
not touched.

B batch, S sequence, V vocabulary, C width, H heads, D = C / H head width, L layers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NORMS = ("rmsnorm", "layernorm")
POSITIONS = ("learned", "rope")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # Primer, So et al. 2021
    "silu": F.silu,
}
NORM_EPS = 1e-5  # GPT-2's and Llama's


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape and variant of a ``GPT``; checked when it is made.

    ``mlp_width``: None means 4 * width. ``bias``: of all projections and of LayerNorm (lm_head has none).
    ``rope_base``: wavelengths run from 2 pi to 2 pi * rope_base tokens. ``init_std``: of every matrix and
    embedding; matrices that write to the residual stream get init_std / sqrt(2 * layers) (GPT-2).
    """

    vocab_size: int
    sequence_tokens: int
    layers: int
    heads: int
    width: int
    mlp_width: int | None = None
    norm: str = "rmsnorm"
    activation: str = "gelu"
    positions: str = "rope"
    rope_base: float = 10_000.0
    bias: bool = False
    tie_embeddings: bool = False
    qk_norm: bool = False
    dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.mlp_width is None:
            object.__setattr__(self, "mlp_width", 4 * self.width)
        for name in ("vocab_size", "sequence_tokens", "layers", "heads", "width", "mlp_width"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} {value!r} must be a positive integer")
        choices = {"norm": NORMS, "activation": tuple(ACTIVATIONS), "positions": POSITIONS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
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
        for name in ("init_std", "rope_base"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be positive")

    @property
    def head_width(self) -> int:
        """D = width / heads."""
        return self.width // self.heads

    def build(self, *, seed: int, pretrained: bool = True) -> GPT:
        """The model with its initial weights."""
        return GPT(self, seed=seed)


def rope_angles(positions: Tensor, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin, [S, D] float32, of position * base^(-2i/D) for the pairs (i, i + D/2).

    RoFormer (Su et al., 2104.09864), in the half-split pairing of GPT-NeoX and Llama. ``positions``: [S].
    """
    exponent = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width
    angle = positions.to(torch.float32)[:, None] * base**-exponent  # [S, D/2]
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair of ``x`` [B, H, S, D] by its angle; at least float32 inside, dtype of ``x`` outside."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-high, low), dim=-1) * sin).to(x.dtype)


def make_norm(config: GPTConfig, width: int) -> nn.RMSNorm | nn.LayerNorm:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(width, eps=NORM_EPS)
    return nn.LayerNorm(width, eps=NORM_EPS, bias=config.bias)


def _normalise(norm: nn.RMSNorm | nn.LayerNorm | None, x: Tensor) -> Tensor:
    """``norm`` of ``x`` in the precision of its gain: under autocast ``x`` is bf16 and the fused kernels want one
    dtype; out comes the dtype of ``x``."""
    if norm is None:
        return x
    return norm(x.to(norm.weight.dtype)).to(x.dtype)


class Attention(nn.Module):
    """Causal multi-head attention: [B, S, C] -> [B, S, C]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.head_width, self.dropout = config.heads, config.head_width, config.dropout
        self.q = nn.Linear(config.width, config.width, bias=config.bias)
        self.k = nn.Linear(config.width, config.width, bias=config.bias)
        self.v = nn.Linear(config.width, config.width, bias=config.bias)
        self.o = nn.Linear(config.width, config.width, bias=config.bias)
        self.q_norm = make_norm(config, config.head_width) if config.qk_norm else None
        self.k_norm = make_norm(config, config.head_width) if config.qk_norm else None
        self.q_rope, self.k_rope, self.v_hook = nn.Identity(), nn.Identity(), nn.Identity()
        self.logits_hook: nn.Module | None = None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, sequence, width = x.shape
        shape = (batch, sequence, self.heads, self.head_width)
        q = _normalise(self.q_norm, self.q(x).view(shape)).transpose(1, 2)  # [B, H, S, D]
        k = _normalise(self.k_norm, self.k(x).view(shape)).transpose(1, 2)
        v = self.v_hook(self.v(x).view(shape).transpose(1, 2))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k = self.q_rope(q), self.k_rope(k)
        dropout = self.dropout if self.training else 0.0
        if self.logits_hook is None:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            y = self._explicit(q, k, v, dropout, self.logits_hook)
        return self.o(y.transpose(1, 2).reshape(batch, sequence, width))

    def _explicit(self, q: Tensor, k: Tensor, v: Tensor, dropout: float, hook: nn.Module) -> Tensor:
        logits = q @ k.transpose(-2, -1) / math.sqrt(self.head_width)  # [B, H, S, S]
        future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        logits = hook(logits).masked_fill(future, -math.inf)
        return F.dropout(logits.softmax(dim=-1), dropout) @ v


class MLP(nn.Module):
    """[B, S, C] -> [B, S, mlp_width] -> [B, S, C]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.mlp_width is not None  # set by the config itself
        self.up = nn.Linear(config.width, config.mlp_width, bias=config.bias)
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.bias)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn_norm = make_norm(config, config.width)
        self.attn = Attention(config)
        self.mlp_norm = make_norm(config, config.width)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.dropout(self.attn(self.attn_norm(x), rope))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """tokens [B, S] int64, S <= sequence_tokens -> logits [B, S, V].

    ``seed``: of the initial weights. Under ``torch.device("meta")`` nothing is allocated or initialised: call
    ``to_empty(device=...)``, then ``init_weights(seed)``, which also ties again what ``to_empty`` untied.
    """

    def __init__(self, config: GPTConfig, *, seed: int = 0, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        device = torch.get_default_device()
        with torch.device(
            "meta"
        ):  # so that no default initialisation runs or draws from the global generator
            self.token_embedding = nn.Embedding(config.vocab_size, config.width)
            self.position_embedding = (
                nn.Embedding(config.sequence_tokens, config.width) if config.positions == "learned" else None
            )
            self.dropout = nn.Dropout(config.dropout)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
            self.final_norm = make_norm(config, config.width)
            self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self._tie()
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights(seed)

    def _tie(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.token_embedding.weight

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draws every parameter anew on the CPU, in float32, from a generator seeded by (seed, its name)."""
        self._tie()
        residual_std = self.config.init_std / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:  # norm gains
                parameter.fill_(1.0)
            else:
                writes_residual = name.endswith(("attn.o.weight", "mlp.down.weight"))
                std = residual_std if writes_residual else self.config.init_std
                # The CPU generator (MT19937) uses the low 32 bits of a seed only: hash both into them.
                generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
                parameter.copy_(drawn * std)

    def repeated_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute each block's activations in the backward pass: about L times less memory, a third more time."""
        self.activation_checkpointing = enabled

    def forward(self, tokens: Tensor) -> Tensor:
        sequence = tokens.shape[1]
        if sequence > self.config.sequence_tokens:
            raise ValueError(
                f"{sequence} tokens exceed the model's sequence_tokens {self.config.sequence_tokens}; crop the "
                "input or build the model for longer sequences"
            )
        positions = torch.arange(sequence, device=tokens.device)
        x = self.token_embedding(tokens)  # [B, S, C]
        rope = None
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        else:
            rope = rope_angles(positions, self.config.head_width, self.config.rope_base)
        x = self.dropout(x)
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope)
        return self.lm_head(self.final_norm(x))

    def num_parameters(self, *, non_embedding: bool = False) -> int:
        """Trainable numbers, a tied matrix once. ``non_embedding``: without embeddings, positions and lm_head."""
        embeddings = [self.token_embedding, self.position_embedding, self.lm_head]
        left_out = {id(m.weight) for m in embeddings if m is not None} if non_embedding else set()
        return sum(p.numel() for p in self.parameters() if id(p) not in left_out)

    def flops_per_token(self) -> int:
        """Training FLOPs a token at full sequence length: 6 N + 12 L C S (PaLM, 2204.02311, appendix B).

        N counts what takes part in a GEMM: the non-embedding parameters (Kaplan et al., 2001.08361) and the
        V * C of lm_head, tied or not. 6 = 2 (multiply, add) * 3 (forward, dx, dW). As in PaLM, attention is
        not halved for causality and recomputation is not counted.
        """
        config = self.config
        gemm_parameters = self.num_parameters(non_embedding=True) + config.vocab_size * config.width
        return 6 * gemm_parameters + 12 * config.layers * config.width * config.sequence_tokens
