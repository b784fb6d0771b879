"""Native layers: against the equations and the oracle, beside simulated ones, compiled, checkpointed; what they refuse."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import equations
import pytest
import torch
from layer_recipes import LAYERS
from layer_steps import OFFSET, SEED, STEP, assert_follows, hostile, step
from qtrain_kernels.int8_scaled_mm import int8_scaled_mm
from qtrain_kernels.quantize_rows_columns import quantize_rows_columns
from torch import nn

from qtrain.nn import Clock, QuantizedLinear, apply_recipe
from qtrain.nn.native import NativeLinear
from qtrain.nn.native_ops import obstacles
from qtrain.quant import LinearRecipe, ModelRecipe

ALL = {
    "requantized": {
        "fprop": {"input": "int8_row", "weight": "int8_row"},
        "dgrad": {"grad_output": "int8_row", "weight": "int8_row"},
        "wgrad": {"grad_output": "int8_row", "input": "int8_row"},
    },
    "requantized_saved": {
        "fprop": {"input": "int8_row", "weight": "int8_row"},
        "dgrad": {"grad_output": "int8_row", "weight": "int8_row"},
        "wgrad": {"grad_output": "int8_row", "input": "int8_row"},
        "saved": "quantized",
    },
    "reused_saved_stochastic": {
        "fprop": {"input": "int8_row_sr", "weight": "int8_row_sr"},
        "dgrad": {"grad_output": "int8_row_sr", "weight": "fprop"},
        "wgrad": {"grad_output": "int8_row_sr", "input": "fprop"},
        "saved": "quantized",
    },
    "forward_alone": {"fprop": {"input": "int8_row", "weight": "int8_tensor"}},
    "weight_gradient_alone": {"wgrad": {"grad_output": "int8_row_sr", "input": "int8_row"}},
    **{
        name: recipe
        for name, recipe in LAYERS.items()
        if not obstacles(LinearRecipe(**recipe)) and LinearRecipe(**recipe).quantizes
    },
}


def layer_of(name: str, in_features: int, out_features: int, *, native: bool = True, bias: bool = True) -> QuantizedLinear:  # fmt: skip
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=bias)
    recipe = LinearRecipe(**ALL[name])
    clock = Clock(SEED)
    layer = QuantizedLinear.convert(linear, recipe, name="blocks.0.up", clock=clock, native=native)
    clock.set(step=STEP, token_offset=OFFSET)
    assert isinstance(layer, QuantizedLinear)
    return layer


def test_the_recipes_reach_every_kind_of_operand() -> None:
    assert {"int8_reused", "tensor_reused", "int4_own_specs", "saved_stochastic"} <= set(ALL)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bias", [True, False])
def test_fp32_follows_the_equations(name: str, bias: bool) -> None:
    layer, x = layer_of(name, 37, 23, bias=bias), hostile(15, 37)
    before = int8_scaled_mm.calls
    seen = step(layer, x, autocast=False)
    gemms = sum(
        layer.recipe.resolved(f"{g}") is not None for g in ("fprop.input", "dgrad.weight", "wgrad.input")
    )
    assert int8_scaled_mm.calls - before == gemms
    assert_follows(name, layer.recipe, layer, x, seen, "fp32")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("incoming", [torch.float32, torch.bfloat16])
def test_bf16_autocast_follows_the_equations(name: str, incoming: torch.dtype) -> None:
    layer, x = layer_of(name, 37, 23), hostile(15, 37).to(incoming)
    seen = step(layer, x, autocast=True)
    assert (seen["y"].dtype, seen["dx"].dtype, seen["dW"].dtype) == (torch.bfloat16, incoming, torch.float32)
    assert_follows(name, layer.recipe, layer, x, seen, "bf16")


@pytest.mark.parametrize("name", ALL)
def test_native_lies_nearer_to_the_equations_than_a_rounding(name: str) -> None:
    """One rounding to bfloat16 of exact sums, 2^-8 of the value, where all GEMMs run on codes: half of what
    simulated is allowed."""
    layer, x = layer_of(name, 37, 23, bias=False), hostile(15, 37)
    seen = step(layer, x, autocast=True)
    expected = equations.layer(layer.recipe, x, layer.weight, None, seen["g"], equations.Moment(SEED, STEP, OFFSET, "blocks.0.up"))  # fmt: skip
    for what, gemm in (("y", "fprop.input"), ("dx", "dgrad.weight"), ("dW", "wgrad.input")):
        if layer.recipe.resolved(gemm) is None:
            continue
        value = expected[what].value
        rounding = 2.0**-20 if what == "dW" else 2.0**-8
        terms = 2.0**-22 * abs(value).max()  # the equations scale before they sum, and their terms cancel
        assert (abs(equations._dense(seen[what]) - value) <= rounding * abs(value) + terms).all(), what


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("autocast", [False, True])
def test_native_equals_simulated_up_to_the_latters_roundings(name: str, autocast: bool) -> None:
    x = hostile(15, 37)
    native, simulated = (step(layer_of(name, 37, 23, native=n), x, autocast=autocast) for n in (True, False))
    for what in ("y", "dx", "dW", "db"):
        a, b = native[what].float(), simulated[what].float()
        size = b.abs().max()
        bound = 2.0**-6 if autocast else 2.0**-18
        assert (a - b).abs().max() <= bound * size, what


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 65, 3), (17, 3, 1), (64, 64, 64), (3, 17, 65)])
def test_odd_shapes(shape: tuple[int, int, int]) -> None:
    tokens, in_features, out_features = shape
    layer = layer_of("reused_saved_stochastic", in_features, out_features)
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(1))
    g = torch.randn(tokens, out_features, generator=torch.Generator().manual_seed(2))
    assert_follows("odd", layer.recipe, layer, x, step(layer, x, autocast=False, g=g), "fp32")


def test_no_tokens() -> None:
    seen = step(layer_of("int8_reused", 37, 23), torch.zeros(0, 37), autocast=True, g=torch.zeros(0, 23))
    assert seen["y"].shape == (0, 23)
    assert (seen["dW"] == 0).all()


@pytest.mark.parametrize("name", ["int8_reused", "requantized"])
def test_what_is_not_finite_stays_visible(name: str) -> None:
    x = hostile(15, 37)
    x[2, 5] = float("inf")
    seen = step(layer_of(name, 37, 23), x, autocast=True)
    assert seen["y"][2].isnan().all()
    assert seen["y"][[0, 1, 3]].isfinite().all()
    assert not seen["dW"].isfinite().any() if name == "int8_reused" else seen["dW"][:, 5].isnan().all()


@pytest.mark.parametrize("saved", ["high_precision", "quantized"])
def test_saved_for_the_backward(saved: str) -> None:
    """int8 codes of x and W: at most .55 of bf16's bytes."""
    layer = layer_of("int8_reused", 256, 512, bias=False)
    layer.recipe = LinearRecipe(**{**ALL["int8_reused"], "saved": saved})
    x, kept = torch.randn(512, 256).bfloat16().requires_grad_(), []

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() != layer.weight.data_ptr():
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        layer(x)
    held = sum(t.numel() * t.element_size() for t in kept)
    bf16 = 2 * (x.numel() + layer.weight.numel())
    assert (held <= 0.55 * bf16) == (saved == "quantized"), held / bf16


@pytest.mark.parametrize("name", ["int8_reused", "reused_saved_stochastic", "forward_alone"])
def test_fullgraph_compile_gives_the_same_bits(name: str) -> None:
    torch.compiler.reset()
    layer, x = layer_of(name, 37, 23), hostile(15, 37)
    eager = step(layer, x, autocast=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert isinstance(layer, nn.Module)
    compiled.bias = layer.bias
    seen = step(compiled, x, autocast=True)
    assert all(torch.equal(seen[what], eager[what]) for what in ("y", "dx", "dW", "db"))


def test_checkpointing_recomputes_the_same_bits() -> None:
    from torch.utils.checkpoint import checkpoint

    x = hostile(15, 37)
    layer = layer_of("reused_saved_stochastic", 37, 23)
    plain = step(layer, x, autocast=True)
    entered = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = checkpoint(layer, entered, use_reentrant=False)
    layer.clock.set(step=STEP, token_offset=OFFSET)
    y.backward(plain["g"])
    assert torch.equal(layer.weight.grad, plain["dW"])
    assert torch.equal(entered.grad, plain["dx"])


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ({"wgrad": {"grad_output": "int8_column", "input": "int8_row"}}, "wgrad.grad_output=int8 column: column scales"),
        ({"fprop": {"weight": "int8_row"}}, "fprop.input=none beside a quantized operand: write int8_row"),
        ({"fprop": {"weight": "e4m3_row", "input": "int8_row"}}, "fprop.weight=e4m3 row: the GEMM multiplies symmetric integers"),
        ({"fprop": {"weight": "int8_row_asym", "input": "int8_row"}}, "symmetric integers"),
        ({"fprop": {"weight": "int8_group32", "input": "int8_row"}}, "group:32 scales do not fold"),
        ({"fprop": {"weight": "int8_row_mse", "input": "int8_row"}}, "clip=mse"),
        ({"fprop": {"weight": "int8_row_clipped", "input": "int8_row"}}, "estimator=clipped"),
        ({"fprop": {"weight": "int8_row", "input": "int8_row", "transform": "hadamard:4"}}, "fprop.transform=hadamard:4"),
    ],
)  # fmt: skip
def test_what_has_no_native_path_is_refused(recipe: dict, text: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(ValueError, match=r"compute=native: 0 \(Linear\)") as raised:
        apply_recipe(model, ModelRecipe(linear=recipe, compute="native"))
    assert text in str(raised.value)
    assert type(model[0]) is nn.Linear, "nothing is changed"
    report = apply_recipe(model, ModelRecipe(linear=recipe, compute="auto"))
    assert report.compute.startswith("simulated (")
    assert not model[0].native


def test_devices_without_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, recipe = nn.Sequential(nn.Linear(8, 8)), ALL["int8_reused"]
    monkeypatch.setattr(int8_scaled_mm, "kernels", {"cpu": int8_scaled_mm.kernels["cpu"]})
    lacks = "int8 on cuda has no kernel of int8_scaled_mm (there is one for cpu)"
    monkeypatch.setattr(quantize_rows_columns, "kernels", {"cpu": "", "cuda": ""})
    with pytest.raises(ValueError, match=re.escape(f"compute=native: 0 (Linear): {lacks}")):
        apply_recipe(model, ModelRecipe(linear=recipe, compute="native"), device="cuda")
    report = apply_recipe(model, ModelRecipe(linear=recipe, compute="auto"), device="cuda")
    assert report.compute == f"simulated ({lacks})"
    monkeypatch.undo()
    apply_recipe(model, ModelRecipe(linear=recipe, compute="native"))
    nothing = (None, None, model[0].recipe, 0, torch.float32, True, None, None)
    with pytest.raises(RuntimeError, match="int8 on meta has no kernel of quantize_rows_columns"):
        NativeLinear.apply(torch.zeros(3, 8, device="meta"), None, model[0].weight, *nothing)


def test_a_device_with_both_kernels_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in (int8_scaled_mm, quantize_rows_columns):
        monkeypatch.setattr(op, "kernels", {"cuda": "", "cpu": ""})
    model = nn.Sequential(nn.Linear(8, 8))
    report = apply_recipe(model, ModelRecipe(linear=ALL["int8_reused"], compute="native"), device="cuda")
    assert report.compute == "native, int8 on cuda"
    assert report.layers[0].native


def test_auto_is_native_where_kernels_were_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from qtrain_kernels.cpu_tier import Tier

    from qtrain.nn import surgery

    model, recipe = nn.Sequential(nn.Linear(8, 8)), ALL["int8_reused"]
    monkeypatch.setattr(surgery, "tier", lambda: Tier("torch", "install g++", None))
    report = apply_recipe(model, ModelRecipe(linear=recipe, compute="auto"))
    assert report.compute == "simulated (only torch's int8 GEMM is here: install g++)"
    assert apply_recipe(model, ModelRecipe(linear=recipe, compute="native")).layers[0].native
    monkeypatch.setattr(surgery, "tier", lambda: Tier("amx", "", object()))  # type: ignore[arg-type]
    report = apply_recipe(model, ModelRecipe(linear=recipe, compute="auto"))
    assert report.compute == "native, int8 on amx"
    assert report.layers[0].native
    assert "native" in str(model[0])


RANK = """
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from qtrain.models.gpt import GPT, GPTConfig
from qtrain.nn import apply_recipe
from qtrain.quant import ModelRecipe

sr = "int8_row_sr"
linear = {"fprop": {"input": sr, "weight": sr}, "dgrad": {"grad_output": sr, "weight": "fprop"},
          "wgrad": {"grad_output": sr, "input": "fprop"}, "saved": "quantized"}
model = GPT(GPTConfig(vocab_size=61, sequence_tokens=16, layers=1, heads=2, width=32), seed=1)
report = apply_recipe(model, ModelRecipe(linear=linear, compute="native"), seed=5)
tokens = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(1))
world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
if world > 1:
    dist.init_process_group("gloo")
    model = DistributedDataParallel(model)
for micro in range(rank, 2, world):  # two micro-batches, by one process or by two
    report.clock.set(step=3, token_offset=32 * micro)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens[2 * micro : 2 * micro + 2, :-1])
    targets = tokens[2 * micro : 2 * micro + 2, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets)
    (loss if world > 1 else loss / 2).backward()
if rank == 0:
    torch.save({n.removeprefix("module."): p.grad for n, p in model.named_parameters()}, sys.argv[1])
"""


def test_ddp_on_gloo_gives_the_gradients_of_one_process(tmp_path: Path) -> None:
    port = str(29500 + os.getpid() % 2000)
    found = []
    for world in (1, 2):
        path = tmp_path / f"{world}.pt"
        words = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(path)], env=os.environ | words | {"RANK": str(r)}
            )
            for r in range(world)
        ]
        assert [process.wait(timeout=300) for process in ranks] == [0] * world
        found.append(torch.load(path))
    one, two = found
    assert one.keys() == two.keys()
    for name, grad in one.items():
        assert torch.allclose(grad, two[name], rtol=1e-6, atol=1e-9), name
