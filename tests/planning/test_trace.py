"""The trace on fake tensors against real models: every byte that autograd keeps, gradients, FLOPs by the book."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qtrain.models.gpt import GPTConfig
from qtrain.models.llama import LlamaConfig
from qtrain.nn import apply_recipe
from qtrain.nn.saved_tensors import saved_bytes
from qtrain.planning.check import RECIPES
from qtrain.planning.operations import ATTENTION, GEMM
from qtrain.planning.trace import StepTrace, token_loss, trace_step
from qtrain.quant import ModelRecipe

B, S = 3, 20
MODELS: dict[str, Any] = {
    "gpt2": GPTConfig(
        vocab_size=70, sequence_tokens=S, layers=3, heads=2, width=32, norm="layernorm", activation="gelu_tanh",
        positions="learned", bias=True, tie_embeddings=True,
    ),
    "llama": LlamaConfig(
        vocab_size=70, sequence_tokens=S, layers=3, heads=4, kv_heads=2, width=32, mlp_width=88, qk_norm=True
    ),
    "bitnet": LlamaConfig(vocab_size=70, sequence_tokens=S, layers=2, heads=2, width=32, mlp_width=64, sub_norm=True),
}  # fmt: skip


def traced(config: Any, recipe: ModelRecipe, **more: Any) -> StepTrace:
    return trace_step(config, recipe, **{"sequences": B, "tokens": S, "device_type": "cpu", **more})


def really_kept(config: Any, recipe: ModelRecipe, dtype: torch.dtype = torch.bfloat16) -> int:
    model = config.build(seed=0)
    apply_recipe(model, recipe)
    tokens = torch.randint(config.vocab_size, (B, S + 1))

    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(tokens[:, :-1])
        return token_loss(logits, tokens[:, 1:])

    return saved_bytes(run, [*model.parameters(), tokens])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_what_is_kept_is_what_autograd_keeps(model: str, recipe: str) -> None:
    if model == "bitnet" and recipe == "int8_lean":
        pytest.skip("its down reads a norm: there is nothing to recompute")
    trace = traced(MODELS[model], RECIPES[recipe])
    # Less the ids themselves, which the measurement leaves out: B (S + 1) int64
    assert sum(trace.kept().values()) - 8 * B * (S + 1) == pytest.approx(
        really_kept(MODELS[model], RECIPES[recipe]), rel=2e-3
    )


def test_float32_keeps_no_copies_of_weights() -> None:
    trace = traced(MODELS["llama"], ModelRecipe(), dtype=torch.float32)
    assert trace.kept().get("weight copies", 0) == 0
    assert sum(trace.kept().values()) == pytest.approx(
        really_kept(MODELS["llama"], ModelRecipe(), torch.float32) + 8 * B * (S + 1), rel=2e-3
    )


def test_weight_copies_are_two_bytes_a_linear_weight_under_bf16() -> None:
    trace = traced(MODELS["llama"], ModelRecipe())
    linear = 3 * (32 * 32 * 2 + 2 * 16 * 32 + 3 * 32 * 88) + 70 * 32
    assert trace.kept()["weight copies"] == 2 * linear
    native = traced(MODELS["llama"], RECIPES["int8_lean"]).kept()
    assert native["weight copies"] == 2 * 70 * 32, "a native layer keeps nothing of W; lm_head is in bf16"


def test_blocks_that_are_alike_are_run_once_and_others_are_not() -> None:
    recipe = ModelRecipe(
        linear=RECIPES["all_gemms"].linear,
        rules=[{"pattern": "blocks.1.*", "recipe": None}],  # type: ignore[list-item]
        exclude=["lm_head"],
    )
    trace = traced(MODELS["llama"], recipe)
    assert [count for _, count in trace.blocks] == [2, 1]
    quantized, plain = (piece for piece, _ in trace.blocks)
    assert plain.kept_bytes == traced(MODELS["llama"], ModelRecipe()).blocks[0][0].kept_bytes
    assert quantized.kept_bytes != plain.kept_bytes
    assert sum(trace.kept().values()) - 8 * B * (S + 1) == pytest.approx(
        really_kept(MODELS["llama"], recipe), rel=2e-3
    )


def test_gradients_are_the_parameters() -> None:
    for name, config in MODELS.items():
        trace = traced(config, ModelRecipe())
        found = sum(count * piece.gradients for piece, count in trace.pieces())
        assert found == 4 * config.build(seed=0).num_parameters(), name


def test_flops_are_palms() -> None:
    """6 N + 12 L H D S a token (``flops_per_token``), with attention halved for causality and 7/2 of its forward in place of 3."""
    config = MODELS["llama"]
    trace = traced(config, ModelRecipe())
    gemm = sum(c * o.flops for p, c in trace.pieces() for o in (*p.forward, *p.backward) if o.kind == GEMM)
    attention = sum(
        c * o.flops for p, c in trace.pieces() for o in (*p.forward, *p.backward) if o.kind == ATTENTION
    )
    whole = config.build(seed=0).flops_per_token()
    of_attention = 12 * config.layers * config.heads * 8 * S
    gains = sum(p.numel() for p in config.build(seed=0).parameters() if p.dim() == 1)  # PaLM's N has them
    assert gemm == B * S * (whole - of_attention - 6 * gains)
    assert attention == B * S * of_attention / 3 * 3.5 / 2


def test_on_a_gpu_a_norm_keeps_its_input_and_a_number_a_row() -> None:
    config = LlamaConfig(vocab_size=70, sequence_tokens=S, layers=1, heads=2, width=32, mlp_width=64)
    kept = {
        kind: traced(config, ModelRecipe(), device_type=kind).blocks[0][0].kept["norm"]
        for kind in ("cpu", "cuda")
    }
    rows = B * S
    assert kept["cuda"] == 2 * (4 * rows * 32 + 4 * rows)
    assert kept["cpu"] > kept["cuda"]


def test_dropout_on_a_gpu_does_not_keep_the_probabilities() -> None:
    long = 256
    config = GPTConfig(vocab_size=70, sequence_tokens=long, layers=1, heads=2, width=32, dropout=0.1)
    kept = {
        kind: traced(config, ModelRecipe(), tokens=long, device_type=kind).kept()["attention"]
        for kind in ("cpu", "cuda")
    }
    assert kept["cpu"] > 2 * B * 2 * long * long, "the CPU's kernel has no dropout: probabilities are formed"
    assert kept["cuda"] < B * long * 32 * 2 * 8


def test_a_large_model_takes_no_memory() -> None:
    """70B parameters, on fake tensors."""
    config = LlamaConfig(
        vocab_size=128256, sequence_tokens=8192, layers=80, heads=64, kv_heads=8, width=8192, mlp_width=28672
    )
    trace = trace_step(config, ModelRecipe(), sequences=1, tokens=8192)
    assert sum(count * piece.gradients for piece, count in trace.pieces()) / 4 == pytest.approx(
        70.55e9, rel=1e-3
    )
    ((block, count),) = trace.blocks
    assert count == 80
    # q, o: 8192^2; k, v: 1024 x 8192; gate, up, down: 8192 x 28672; two gains: float32 gradients
    assert block.gradients == 4 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 8192 * 28672 + 2 * 8192)


def test_a_model_that_hides_its_blocks_is_refused() -> None:
    class Hidden(GPTConfig):
        def build(self, *, seed: int, pretrained: bool = True) -> Any:
            model = super().build(seed=seed)
            model.repeated_blocks = lambda: [torch.nn.Linear(1, 1, device="meta")]
            return model

    config = Hidden(vocab_size=70, sequence_tokens=S, layers=1, heads=2, width=32)
    with pytest.raises(ValueError, match="never called its repeated_blocks"):
        traced(config, ModelRecipe())
