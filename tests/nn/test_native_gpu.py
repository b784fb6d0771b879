"""Native layers on a GPU: to the bit those of the CPU (int8), bounded against the oracle (fp8), compiled, checkpointed,
small; models with the census, with prologues, sharded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from census_models import gpt, loss_of
from layer_recipes import LAYERS
from layer_steps import OFFSET, STEP, assert_follows, hostile, step
from test_native import ALL, is_exact, layer_of
from test_prologue import model_of
from test_saved_tensors import BLOCKS, lean, of_block
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qtrain.nn import QuantizedLinear, apply_recipe, take_census
from qtrain.nn.clock import Draws
from qtrain.nn.compiled import compare_compiled
from qtrain.nn.native_ops import kinds_of, missing_on
from qtrain.nn.oracle import linear_oracle
from qtrain.nn.probe import FP8_SUMS
from qtrain.nn.saved_tensors import saved_bytes
from qtrain.quant import LinearRecipe, ModelRecipe

pytestmark = pytest.mark.gpu
INT8 = [name for name in ALL if is_exact(name)]


@pytest.fixture(autouse=True)
def _cuda() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.compiler.reset()
    yield
    torch.cuda.synchronize()


def on_gpu(name: str, in_features: int, out_features: int, *, native: bool = True) -> QuantizedLinear:
    layer = layer_of(name, in_features, out_features, native=native).cuda()
    if missing := missing_on("cuda", layer.recipe):
        pytest.skip(missing)
    layer.clock.set(step=STEP, token_offset=OFFSET)
    return layer


@pytest.mark.parametrize("name", INT8)
@pytest.mark.parametrize("autocast", [False, True])
def test_it_follows_the_equations(name: str, autocast: bool) -> None:
    """Odd sizes, a row of zeros, an outlier; every gradient."""
    layer, x = on_gpu(name, 37, 23), hostile(15, 37)
    seen = step(layer, x.cuda(), autocast=autocast)
    assert_follows(name, layer.recipe, layer, x, seen, "bf16" if autocast else "fp32")


@pytest.mark.parametrize("name", INT8)
@pytest.mark.parametrize("shape", [(1, 1, 1), (130, 260, 200)])
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
@pytest.mark.parametrize(("shape", "autocast"), [((15, 37, 23), False), ((1000, 768, 520), True)])
def test_it_lies_near_the_oracle(name: str, shape: tuple[int, int, int], autocast: bool) -> None:
    """Odd sizes, a row of zeros, an outlier; every gradient. A rounding to bfloat16 where autocast is on, and the sums:
    int32's are exact, fp8's within FP8_SUMS of their magnitudes."""
    tokens, in_features, out_features = shape
    layer, x = on_gpu(name, in_features, out_features), hostile(tokens, in_features).cuda()
    seen = step(layer, x, autocast=autocast)
    weight = layer.weight.detach()
    gemms = linear_oracle(layer.recipe, Draws(layer.clock.counters, layer.stream), x, weight, seen["g"])
    sums, rounding = 2.0**-20 if name in INT8 else FP8_SUMS, 2.0**-8 if autocast else 2.0**-22
    for what, gemm in zip(("y", "dx", "dW"), gemms.values(), strict=True):
        a, b = gemm.a.multiplied.double(), gemm.b.multiplied.double()
        want = a @ b.t() + (layer.bias.detach() if what == "y" else 0.0)
        magnitude = a.abs() @ b.abs().t()
        plain = (
            gemm.a.spec is None
        )  # high precision: operands are rounded too, and fp32 GEMMs may run on tf32
        bound = 1.01 * rounding * want.abs() + (2.0**-7 if plain else sums) * magnitude + 1e-6
        off = (seen[what].double() - want).abs()
        assert (off <= bound).all(), f"{what}: {(off / bound).max():.3g} bounds"
    if layer.bias is not None:
        assert torch.allclose(seen["db"], seen["g"].float().sum(0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["int8_reused", "reused_saved_stochastic", "fp8_row"])
def test_fullgraph_compile_gives_the_same_bits(name: str) -> None:
    layer, x = on_gpu(name, 96, 64), hostile(128, 96).cuda()
    eager = step(layer, x, autocast=True)
    compiled = torch.compile(layer, fullgraph=True)
    compiled.bias = layer.bias
    seen = step(compiled, x, autocast=True)
    assert all(torch.equal(seen[what], eager[what]) for what in ("y", "dx", "dW"))


@pytest.mark.parametrize("name", ["int8_reused", "reused_saved_stochastic", "requantized_saved", "fp8_row"])
def test_a_cuda_graph_replays_the_bits_of_the_eager_step(name: str) -> None:
    """Nothing waits for the GPU, and nothing is copied from the CPU; the clock is read anew at each replay."""
    layer = on_gpu(name, 96, 64)
    x, g = hostile(128, 96).cuda().requires_grad_(), torch.randn(128, 64, device="cuda").bfloat16()

    def passage() -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, (x, layer.weight, layer.bias), g)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            passage()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = passage()
    for clock_step in (STEP, STEP + 1):
        with torch.no_grad():
            x.mul_(1.5)
        layer.clock.set(step=clock_step, token_offset=OFFSET)
        graph.replay()
        for a, b in zip(passage(), replayed, strict=True):
            assert torch.equal(a, b)


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
    """What a forward under autocast saves for its backward."""

    def run() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return layer(x)

    return saved_bytes(run, layer.parameters())


def test_memory_held_for_the_backward_is_half_of_bf16s() -> None:
    x = torch.randn(4096, 1024, device="cuda", requires_grad=True)
    layer = on_gpu("reused_saved_stochastic", 1024, 2048)
    bf16 = torch.nn.Linear(1024, 2048, device="cuda")
    native, rival = held_bytes(layer, x), held_bytes(bf16, x)
    assert rival >= 2 * x.numel()
    assert native <= 0.55 * rival, (native, rival)


@pytest.mark.parametrize("name", ["int8_reused", "saved_stochastic", "fp8_tensor"])
def test_the_census_of_a_model_passes(name: str) -> None:
    if missing := missing_on("cuda", LinearRecipe(**LAYERS[name])):
        pytest.skip(missing)
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


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_prologues_change_no_bits(kind: str) -> None:
    found = []
    for recompute in (False, True):
        model = model_of(kind).cuda()
        report = apply_recipe(
            model,
            ModelRecipe(linear=LAYERS["int8_reused"], compute="native", recompute_activations=recompute),
        )
        loss_of("bf16")(model).backward()
        found.append([p.grad for p in model.parameters()])
        if recompute:
            model.zero_grad()
            assert take_census(model, report, loss_of("bf16")).failures() == []
    for a, b in zip(*found, strict=True):  # the embedding's gradient adds in any order
        assert (a - b).norm() <= 1e-5 * a.norm()


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_a_lean_block_keeps_three_quarters_of_bf16s(name: str) -> None:
    bf16, native = (of_block(BLOCKS[name], recipe, "cuda") for recipe in (None, lean()))
    ratio = sum(s.nbytes for s in native) / sum(s.nbytes for s in bf16)
    assert ratio <= 0.75, "\n".join(map(str, [f"{ratio:.3f} of bf16's:", *bf16, "native:", *native]))


def test_fully_sharded_gives_the_gradients_of_one_process() -> None:
    """One process of NCCL: gathering, resharding and mixed precision run; the sums are its own."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    found = []
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for sharded in (False, True):
            model, _ = gpt("saved_stochastic", layers=2, compute="native", device="cuda")
            if sharded:
                for block in model.blocks:
                    fully_shard(block)
                fully_shard(model)
            loss_of("bf16")(model).backward()
            found.append([p.grad.full_tensor() if sharded else p.grad for p in model.parameters()])
    finally:
        dist.destroy_process_group()
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)
