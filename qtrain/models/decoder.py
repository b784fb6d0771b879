"""What our decoder families share: rotary embedding, norms, attention, blocks, initial weights.

    x = embed(tokens) [+ position_embedding]
    for each block:  x = x + attn.o(attention(attn.q, attn.k, attn.v of norm(x)))
                     x = x + mlp(norm(x))
    logits = lm_head(norm(x))

Every projection is an ``nn.Linear`` of its own (``blocks.3.attn.q``, ``blocks.3.mlp.down``), so that a rule can
name it; a fused qkv would force one precision on three matrices whose sensitivities differ. What attention
really multiplies passes through named identities: ``attn.q_rope`` [B, H, S, D] and ``attn.k_rope`` [B, K, S, D] (query
and key after rotary embedding, or without one after projection and norm) and ``attn.v_hook`` [B, K, S, D].
``attn.logits_hook`` is None; a module set there receives the scaled causal logits [B, H, S, S], and attention
then takes the explicit path, since the fused kernel never forms them. An MLP says in ``read_by`` that its ``activation`` is
read by ``down`` and by nothing else.

Initial weights depend on the seed and on each parameter's own name: the same seed gives the same model on
every device, a variant with one matrix more leaves the others as they were, and torch's global generator is
not touched.

B batch, S sequence, V vocabulary, C width, H query heads, K key-value heads, D head width, L layers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def _squared(x: Tensor) -> Tensor:
    """In x's dtype: square() is a pow, which autocast computes in float32 on CUDA."""
    return x * x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's
    "relu": F.relu,
    "relu2": lambda x: _squared(F.relu(x)),  # Primer, So et al. 2021
    "silu": F.silu,
}
Norm = nn.RMSNorm | nn.LayerNorm


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The fields and checks that the families share.

    init_std: of every matrix and embedding; matrices that write to the residual stream get
    init_std / sqrt(2 * layers) (GPT-2). init_from: a folder of Hugging Face's layout, or a name on its hub, whose
    weights the model starts from; its shape must be this one (``hf_folder.load_pretrained``).
    """

    vocab_size: int
    sequence_tokens: int
    layers: int
    heads: int
    width: int
    norm_eps: float = 1e-5  # GPT-2's and Llama's
    tie_embeddings: bool = False
    qk_norm: bool = False
    init_std: float = 0.02
    init_from: str | None = None

    def _check(self, counts: tuple[str, ...], positive: tuple[str, ...]) -> None:
        for name in ("vocab_size", "sequence_tokens", "layers", "heads", "width", *counts):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} {value!r} must be a positive integer")
        for name in ("init_std", "norm_eps", *positive):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be positive")

    def _check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"unknown {name} {getattr(self, name)!r}; allowed: {', '.join(allowed)}")

    def _started(self, model: Any, pretrained: bool) -> Any:
        """``model``, with the weights of ``init_from`` where they are wanted."""
        if pretrained and self.init_from is not None:
            from .hf_folder import load_pretrained

            load_pretrained(model, self.init_from)
        return model


@dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Llama 3.1's stretching of the rotary wavelengths for contexts beyond those of pre-training.

    Frequencies whose wavelength is longer than original_sequence_tokens / low_frequency_factor are divided by
    ``factor``, those shorter than original_sequence_tokens / high_frequency_factor stay, and between them the share that
    is divided falls linearly in 1 / wavelength. Source: Llama 3.1's published configuration (rope_type "llama3").
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_sequence_tokens: int

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and self.original_sequence_tokens >= 1):
            raise ValueError(f"{self}: factor and original_sequence_tokens must be 1 or more")
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise ValueError(f"{self}: 0 < low_frequency_factor < high_frequency_factor must hold")

    def scaled(self, frequency: Tensor) -> Tensor:
        """Radians per token, any shape, before and after."""
        turns = frequency * (self.original_sequence_tokens / (2 * math.pi))  # in the original context
        spread = self.high_frequency_factor - self.low_frequency_factor
        kept = ((turns - self.low_frequency_factor) / spread).clamp(0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: wavelengths run from 2 pi to 2 pi * base tokens."""

    head_width: int
    base: float
    scaling: Llama3RopeScaling | None = None


def rope_angles(positions: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """cos and sin, [S, D] float32, of position * base^(-2i/D) for the pairs (i, i + D/2).

    RoFormer (Su et al., 2104.09864), in the half-split pairing of GPT-NeoX and Llama. ``positions``: [S].
    """
    exponent = torch.arange(0, rope.head_width, 2, device=positions.device, dtype=torch.float32)
    frequency = rope.base ** -(exponent / rope.head_width)
    if rope.scaling is not None:
        frequency = rope.scaling.scaled(frequency)
    angle = positions.to(torch.float32)[:, None] * frequency  # [S, D/2]
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair of ``x`` [B, H, S, D] by its angle; at least float32 inside, dtype of ``x`` outside."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-high, low), dim=-1) * sin).to(x.dtype)


def normalise(norm: Norm | None, x: Tensor) -> Tensor:
    """``norm`` of ``x`` in the precision of its gain: under autocast ``x`` is bf16 and the fused kernels want one
    dtype; out comes the dtype of ``x``."""
    if norm is None:
        return x
    return norm(x.to(norm.weight.dtype)).to(x.dtype)


class Activation(nn.Module):
    """f(h), or f(h) * up where an ``up`` is given; all [..., M]. name: of ACTIVATIONS."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, h: Tensor, up: Tensor | None = None) -> Tensor:
        y = ACTIVATIONS[self.name](h)
        return y if up is None else y * up

    def extra_repr(self) -> str:
        return self.name


class Attention(nn.Module):
    """Causal attention, [B, S, C] -> [B, S, C]; query head h reads key-value head h // (H / K) (GQA, Ainslie et al.,
    2305.13245).

    norm: what makes the norms of a given width, for ``qk_norm`` (of each query and key head before rotation, Henry et
    al., 2010.04245) and for ``sub_norm`` (of what ``o`` reads: SubLN of BitNet, Wang et al., 2310.11453).
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        kv_heads: int,
        head_width: int,
        norm: Callable[[int], Norm],
        qkv_bias: bool = False,
        o_bias: bool = False,
        sub_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width, inner = config.width, config.heads * head_width
        self.heads, self.kv_heads, self.head_width, self.dropout = config.heads, kv_heads, head_width, dropout
        self.q = nn.Linear(width, inner, bias=qkv_bias)
        self.k = nn.Linear(width, kv_heads * head_width, bias=qkv_bias)
        self.v = nn.Linear(width, kv_heads * head_width, bias=qkv_bias)
        self.o = nn.Linear(inner, width, bias=o_bias)
        self.q_norm = norm(head_width) if config.qk_norm else None
        self.k_norm = norm(head_width) if config.qk_norm else None
        self.sub_norm = norm(inner) if sub_norm else None
        self.q_rope, self.k_rope, self.v_hook = nn.Identity(), nn.Identity(), nn.Identity()
        self.logits_hook: nn.Module | None = None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        shape = (*x.shape[:2], -1, self.head_width)
        q = normalise(self.q_norm, self.q(x).view(shape)).transpose(1, 2)  # [B, H, S, D]
        k = normalise(self.k_norm, self.k(x).view(shape)).transpose(1, 2)  # [B, K, S, D]
        v = self.v_hook(self.v(x).view(shape).transpose(1, 2))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k = self.q_rope(q), self.k_rope(k)
        dropout = self.dropout if self.training else 0.0
        if self.logits_hook is None:
            grouped = self.kv_heads != self.heads
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=grouped)
        else:
            y = self._explicit(q, k, v, dropout, self.logits_hook)
        return self.o(normalise(self.sub_norm, y.transpose(1, 2).flatten(2)))

    def _explicit(self, q: Tensor, k: Tensor, v: Tensor, dropout: float, hook: nn.Module) -> Tensor:
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        logits = q @ k.transpose(-2, -1) / math.sqrt(self.head_width)  # [B, H, S, S]
        future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        logits = hook(logits).masked_fill(future, -math.inf)
        return F.dropout(logits.softmax(dim=-1), dropout) @ v


class Block(nn.Module):
    def __init__(self, norm: Callable[[int], Norm], attn: Attention, mlp: nn.Module, dropout: float) -> None:
        super().__init__()
        width = attn.o.out_features
        self.attn_norm = norm(width)
        self.attn = attn
        self.mlp_norm = norm(width)
        self.mlp = mlp
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.dropout(self.attn(self.attn_norm(x), rope))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Decoder(nn.Module):
    """tokens [B, S] int64, S <= sequence_tokens -> logits [B, S, V].

    ``seed``: of the initial weights. Under ``torch.device("meta")`` nothing is allocated or initialised: call
    ``to_empty(device=...)``, then ``init_weights(seed)``, which also ties again what ``to_empty`` untied.
    rope: None for learned positions.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        block: Callable[[], Block],
        norm: Callable[[int], Norm],
        rope: Rope | None,
        dropout: float,
        seed: int,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.config, self.rope = config, rope
        self.activation_checkpointing = activation_checkpointing
        device = torch.get_default_device()
        # so that no default initialisation runs or draws from the global generator
        with torch.device("meta"):
            self.token_embedding = nn.Embedding(config.vocab_size, config.width)
            self.position_embedding = (
                nn.Embedding(config.sequence_tokens, config.width) if rope is None else None
            )
            self.dropout = nn.Dropout(dropout)
            self.blocks = nn.ModuleList(block() for _ in range(config.layers))
            self.final_norm = norm(config.width)
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
        """Draws every parameter anew on the CPU, in float32, from a generator seeded by (seed, its name): matrices
        and embeddings N(0, init_std^2), those that write to the residual stream N(0, init_std^2 / 2L); norm gains
        are 1 and biases 0."""
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
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        angles = None if self.rope is None else rope_angles(positions, self.rope)
        x = self.dropout(x)
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, angles, use_reentrant=False)
            else:
                x = block(x, angles)
        return self.lm_head(self.final_norm(x))

    def num_parameters(self, *, non_embedding: bool = False) -> int:
        """Trainable numbers, a tied matrix once. ``non_embedding``: without embeddings, positions and lm_head."""
        embeddings = [self.token_embedding, self.position_embedding, self.lm_head]
        left_out = {id(m.weight) for m in embeddings if m is not None} if non_embedding else set()
        return sum(p.numel() for p in self.parameters() if id(p) not in left_out)

    def flops_per_token(self) -> int:
        """Training FLOPs a token at full sequence length: 6 N + 12 L H D S (PaLM, 2204.02311, appendix B).

        N counts what takes part in a GEMM: the non-embedding parameters (Kaplan et al., 2001.08361) and the
        V * C of lm_head, tied or not. 6 = 2 (multiply, add) * 3 (forward, dx, dW). As in PaLM, attention is
        not halved for causality and recomputation is not counted.
        """
        config, attn = self.config, self.get_submodule("blocks.0.attn")
        assert isinstance(attn, Attention)
        gemm_parameters = self.num_parameters(non_embedding=True) + config.vocab_size * config.width
        attention = config.layers * attn.heads * attn.head_width * config.sequence_tokens
        return 6 * gemm_parameters + 12 * attention
