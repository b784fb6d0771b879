"""Native layers on a GPU: to the bit those of the CPU (int8), bounded against the oracle, compiled, checkpointed, small."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from census_models import gpt, loss_of
from layer_recipes import LAYERS
from layer_steps import OFFSET, STEP, assert_follows, hostile, step
from test_native import ALL, layer_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qtrain.nn import QuantizedLinear, take_census
from qtrain.nn.compiled import compare_compiled
from qtrain.nn.native_ops import kinds_of
from qtrain.nn.oracle import linear_oracle
from qtrain.quant import LinearRecipe

pytestmark = pytest.mark.gpu
INT8 = [name for name in ALL if kinds_of(LinearRecipe(**ALL[name])) == ["int8"]]


@pytest.fixture(autouse=True)
def _cuda() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.compiler.reset()
    yield
    torch.cuda.synchronize()


def on_gpu(name: str, in_features: int, out_features: int, *, native: bool = True) -> QuantizedLinear:
    layer = layer_of(name, in_features, out_features, native=native).cuda()
    layer.clock.set(step=STEP, token_offset=OFFSET)
    return layer


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("autocast", [False, True])
def test_it_follows_the_equations(name: str, autocast: bool) -> None:
    """Odd sizes, a row of zeros, an outlier; every gradient."""
    layer, x = on_gpu(name, 37, 23), hostile(15, 37)
    seen = step(layer, x.cuda(), autocast=autocast)
    assert_follows(name, layer.recipe, layer, x, seen, "bf16" if autocast else "fp32")


@pytest.mark.parametrize("name", INT8)
@pytest.mark.parametrize("shape", [(15, 37, 23), (1, 1, 1), (130, 260, 200), (512, 384, 640)])
def test_int8_gives_the_bits_of_the_cpu(name: str, shape: tuple[int, int, int]) -> None:
    tokens, in_features, out_features = shape
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(1))
    g = torch.randn(tokens, out_features, generator=torch.Generator().manual_seed(2))
    here = step(layer_of(name, in_features, out_features), x, autocast=True, g=g)
    there = step(on_gpu(name, in_features, out_features), x.cuda(), autocast=True, g=g)
    native = {"y": "fprop.input", "dx": "dgrad.weight", "dW": "wgrad.input"}
    for what, operand in native.items():
        if LinearRecipe(**ALL[name]).resolved(operand) is not None:
            assert torch.equal(here[what], there[what].cpu()), what
        else:
            assert torch.allclose(here[what].float(), there[what].float().cpu(), rtol=2e-2, atol=2e-2), what


@pytest.mark.parametrize("name", ALL)
def test_large_shapes_lie_near_the_oracle(name: str) -> None:
    """One rounding to bfloat16 and the accumulators': int32 is exact, fp8's have 14 bits between promotions."""
    tokens, in_features, out_features = 1000, 768, 520
    layer = on_gpu(name, in_features, out_features)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, in_features, generator=generator).cuda()
    g = torch.randn(tokens, out_features, generator=generator)
    seen = step(layer, x, autocast=True, g=g)
    from qtrain.nn.clock import Draws

    weight = layer.weight.detach()
    gemms = linear_oracle(layer.recipe, Draws(layer.clock.counters, layer.stream), x, weight, seen["g"])
    slack = 2.0**-20 if name in INT8 else 2.0**-11
    for what, gemm in zip(("y", "dx", "dW"), gemms.values(), strict=True):
        want = gemm.result + (layer.bias if what == "y" else 0.0)
        magnitude = gemm.a.multiplied.abs() @ gemm.b.multiplied.abs().t()
        rounded = gemm.a.spec is None  # bf16 operands: each rounded
        bound = 2.0**-8 * want.abs() * 1.01 + (2.0**-7 if rounded else slack) * magnitude + 1e-6
        assert ((seen[what].float() - want).abs() <= bound).all(), what


@pytest.mark.parametrize("name", ["int8_reused", "reused_saved_stochastic", "requantized_saved"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fullgraph_compile_gives_the_same_bits(name: str, backend: str) -> None:
    layer, x = on_gpu(name, 96, 64), hostile(128, 96).cuda()
    eager = step(layer, x, autocast=True)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    seen = step(compiled, x, autocast=True)
    assert all(torch.equal(seen[what], eager[what]) for what in ("y", "dx", "dW"))


def test_checkpointing_recomputes_the_same_bits() -> None:
    x = hostile(64, 96).cuda()
    layer = on_gpu("reused_saved_stochastic", 96, 64)
    plain = step(layer, x, autocast=True)
    entered = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        y = checkpoint(layer, entered, use_reentrant=False)
    y.backward(plain["g"])
    assert torch.equal(layer.weight.grad, plain["dW"])
    assert torch.equal(entered.grad, plain["dx"])


def held_bytes(layer: torch.nn.Module, x: Tensor) -> int:
    """What a forward leaves allocated for its backward, its output aside."""
    with torch.autocast("cuda", torch.bfloat16):
        layer(x)  # whatever is made once
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = layer(x)
    return torch.cuda.memory_allocated() - before - y.numel() * y.element_size()


def test_memory_held_for_the_backward_is_half_of_bf16s() -> None:
    x = torch.randn(4096, 1024, device="cuda", requires_grad=True)
    layer = on_gpu("reused_saved_stochastic", 1024, 2048)
    bf16 = torch.nn.Linear(1024, 2048, device="cuda")
    native, rival = held_bytes(layer, x), held_bytes(bf16, x)
    assert native <= 0.55 * rival, (native, rival)


@pytest.mark.parametrize("name", [n for n in ("int8_reused", "saved_stochastic", "fp8_tensor") if n in ALL])
def test_the_census_of_a_model_passes(name: str) -> None:
    model, report = gpt(name, layers=2, compute="native", device="cuda")
    census = take_census(model, report, loss_of("bf16"))
    assert census.failures() == []
    assert set(census.flops) == set(kinds_of(LinearRecipe(**LAYERS[name])))


def test_a_compiled_model_trains_as_the_eager_one() -> None:
    model, report = gpt("int8_reused", layers=2, compute="native", device="cuda")
    model.compile(fullgraph=True)
    comparison = compare_compiled(model, report, loss_of("bf16"))
    comparison.check()
    assert abs(comparison.loss_compiled - comparison.loss_eager) < 2e-3 * comparison.loss_eager
