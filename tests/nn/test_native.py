"""Native layers: against the equations and the oracle, beside simulated ones, compiled, checkpointed; what they refuse."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar

import equations
import pytest
import torch
from layer_recipes import LAYERS
from layer_steps import OFFSET, SEED, STEP, assert_follows, hostile, step
from qtrain_kernels.int8_scaled_mm import int8_scaled_mm
from qtrain_kernels.quantize_rows_columns import quantize_rows_columns
from torch import nn

from qtrain.nn import Clock, QuantizedLinear, apply_recipe
from qtrain.nn.native_ops import KINDS, kinds_of, obstacles, references_run
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
    "fp8_row": {
        "fprop": {"input": "e4m3_row", "weight": "e4m3_row"},
        "dgrad": {"grad_output": "e4m3_row", "weight": "e4m3_row"},
        "wgrad": {"grad_output": "e4m3_row", "input": "e4m3_row"},
        "saved": "quantized",
    },
    "fp8_row_reused_stochastic": {
        "fprop": {"input": "e4m3_row_sr", "weight": "e4m3_row"},
        "dgrad": {"grad_output": "e5m2_row_sr", "weight": "fprop"},
        "wgrad": {"grad_output": "e5m2_row_sr", "input": "fprop"},
        "saved": "quantized",
    },
    "fp8_forward_int8_backward": {
        "fprop": {"input": "e4m3_row", "weight": "e5m2_tensor"},
        "dgrad": {"grad_output": "int8_row", "weight": "int8_tensor"},
        "wgrad": {"grad_output": "e4m3_row", "input": "e5m2_row"},
    },
    **{
        name: recipe
        for name, recipe in LAYERS.items()
        if not obstacles(LinearRecipe(**recipe)) and LinearRecipe(**recipe).quantizes
    },
}


@pytest.fixture(autouse=True)
def _fp8_by_reference() -> Iterator[None]:
    """There is no fp8 kernel for CPUs."""
    with references_run():
        yield


def is_exact(name: str) -> bool:
    """Whether the sums of its products are: of int8."""
    return kinds_of(LinearRecipe(**ALL[name])) == ["int8"]


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
    before = sum(kind.multiply.calls for kind in KINDS.values())
    seen = step(layer, x, autocast=False)
    gemms = sum(
        layer.recipe.resolved(f"{g}") is not None for g in ("fprop.input", "dgrad.weight", "wgrad.input")
    )
    assert sum(kind.multiply.calls for kind in KINDS.values()) - before == gemms
    assert_follows(name, layer.recipe, layer, x, seen, "fp32")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("incoming", [torch.float32, torch.bfloat16])
def test_bf16_autocast_follows_the_equations(name: str, incoming: torch.dtype) -> None:
    layer, x = layer_of(name, 37, 23), hostile(15, 37).to(incoming)
    seen = step(layer, x, autocast=True)
    assert (seen["y"].dtype, seen["dx"].dtype, seen["dW"].dtype) == (torch.bfloat16, incoming, torch.float32)
    assert_follows(name, layer.recipe, layer, x, seen, "bf16")


@pytest.mark.parametrize("name", ["int8_reused", "requantized", "fp8_row"])
def test_the_gradient_of_a_bfloat16_weight_is_rounded_once(name: str) -> None:
    """dW leaves its GEMM in the weight's dtype: float32's, rounded, and nothing else."""
    x, found = hostile(15, 37).bfloat16(), []
    for dtype in (torch.float32, torch.bfloat16):
        layer = layer_of(name, 37, 23)
        with torch.no_grad():
            layer.weight.copy_(layer.weight.bfloat16())  # so that both quantize the same numbers
        layer.to(dtype)
        found.append(step(layer, x.to(dtype), autocast=True)["dW"])
    assert found[1].dtype == torch.bfloat16
    assert torch.equal(found[1], found[0].bfloat16())
    assert not torch.equal(found[1].float(), found[0])


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
    """int8 codes of x: at most .55 of bf16's bytes."""
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
    bf16 = 2 * x.numel()
    assert (held <= 0.55 * bf16) == (saved == "quantized"), held / bf16


def quantizations(run: Callable[[], object]) -> list[tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]]:  # fmt: skip
    """(arguments, results) of each call of a quantizer."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Look(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if func in [kind.quantize.overload for kind in KINDS.values()]:
                self.seen.append((args, result))
            return result

    with Look() as look:
        run()
    return look.seen


@pytest.mark.parametrize("way", ["row", "row_sr", "tensor", "tensor_sr"])
def test_the_codes_of_w_are_made_again(way: str) -> None:
    """The same codes, of the same draws, though the clock went on; W is read as it is stored, x once."""
    layer, x = layer_of("int8_reused", 37, 23), hostile(15, 37).requires_grad_()
    spec = f"int8_{way}"
    layer.recipe = LinearRecipe(
        fprop={"input": spec, "weight": spec},
        dgrad={"grad_output": spec, "weight": "fprop"},
        wgrad={"grad_output": spec, "input": "fprop"},
        saved="quantized",
    )

    def passage() -> None:
        y = layer(x)
        layer.clock.set(step=STEP + 1, token_offset=0)
        y.sum().backward()

    seen = quantizations(passage)
    assert sum(args[0].shape == x.shape for args, _ in seen) == 1
    of_weight = [(args[0], out) for args, out in seen if args[0].shape == layer.weight.shape]
    assert [w.dtype for w, _ in of_weight] == [torch.float32] * 2
    forward, backward = (out for _, out in of_weight)
    if "tensor" in way:
        assert torch.equal(backward[2], forward[0].t())  # as dgrad reads them: no copy follows
        assert torch.equal(backward[3][:1], forward[1][:1])
    else:
        assert torch.equal(backward[0], forward[0])
        assert torch.equal(backward[1], forward[1])


def test_a_weight_that_was_written_to_is_refused() -> None:
    layer = layer_of("int8_reused", 37, 23)
    y = layer(hostile(15, 37).requires_grad_())
    with torch.no_grad():
        layer.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["requantized_saved", "saved_stochastic", "fp8_row"])
def test_one_read_of_x_makes_the_codes_of_fprop_and_wgrad(name: str) -> None:
    layer, x = layer_of(name, 37, 23), hostile(15, 37).requires_grad_()
    reads = quantizations(lambda: layer(x).sum().backward())
    assert sum(args[0].shape == x.shape for args, _ in reads) == 1
    assert all(args[0].dtype == torch.float32 for args, _ in reads), "W is read as it is stored"


def test_a_layer_that_first_runs_compiled_is_compiled_once() -> None:
    """Its first call leaves nothing behind that a guard of the graph would see change."""
    torch.compiler.reset()
    layer, graphs = layer_of("int8_reused", 16, 24), []
    compiled = torch.compile(
        layer, fullgraph=True, backend=lambda module, inputs: graphs.append(module) or module
    )
    for _ in range(3):
        compiled(torch.randn(4, 16))
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "name",
    ["int8_reused", "reused_saved_stochastic", "forward_alone", "fp8_row_reused_stochastic", "fp8_row"],
)
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
        ({"fprop": {"weight": "e4m3_row", "input": "int8_row"}}, "fprop multiplies int8 with e4m3: write two integers, or two of e4m3, e5m2"),
        ({"fprop": {"weight": "e5m2_row", "input": "e5m2_row"}}, "fprop multiplies e5m2 with e5m2, which no GEMM does: write e4m3"),
        ({"fprop": {"weight": "e3m4_row", "input": "e4m3_row"}}, "fprop.weight=e3m4 row: the GEMMs multiply symmetric integers, int2 ... int8, e4m3 and e5m2"),
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


def test_fp8_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reference would run, and be slow."""
    monkeypatch.setattr("qtrain.nn.native_ops._references_run", False)
    model, recipe = nn.Sequential(nn.Linear(8, 8)), ALL["fp8_row"]
    lacks = re.escape("fp8 on cpu has no kernel of quantize_fp8_rows_columns")
    with pytest.raises(ValueError, match=rf"compute=native: 0 \(Linear\): {lacks}"):
        apply_recipe(model, ModelRecipe(linear=recipe, compute="native"))
    report = apply_recipe(model, ModelRecipe(linear=recipe, compute="auto"))
    assert re.match(rf"simulated \({lacks}", report.compute)


def test_devices_without_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtrain.nn.native_ops._references_run", False)
    model, recipe = nn.Sequential(nn.Linear(8, 8)), ALL["int8_reused"]
    monkeypatch.setattr(int8_scaled_mm, "kernels", {"cpu": int8_scaled_mm.kernels["cpu"]})
    lacks = "int8 on cuda has no kernel of int8_scaled_mm (there is one for cpu)"
    monkeypatch.setattr(quantize_rows_columns, "kernels", {"cpu": "", "cuda": ""})
    with pytest.raises(ValueError, match=re.escape(f"compute=native: 0 (Linear): {lacks}")):
        apply_recipe(model, ModelRecipe(linear=recipe, compute="native"), device="cuda")
    report = apply_recipe(model, ModelRecipe(linear=recipe, compute="auto"), device="cuda")
    assert report.compute == f"simulated ({lacks})"
    monkeypatch.undo()
    monkeypatch.setattr("qtrain.nn.native_ops._references_run", False)
    monkeypatch.setattr(int8_scaled_mm, "kernels", {"cuda": ""})
    with pytest.raises(RuntimeError, match="up: compute=native: int8 on cpu has no kernel of int8_scaled_mm"):
        layer_of("int8_reused", 8, 8)(torch.zeros(3, 8))


def test_the_short_way_to_a_kernel_gives_the_bits_of_the_op_and_is_counted() -> None:
    """``run`` leaves the dispatcher out where nobody looks; under a dispatch mode the op itself is called."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Look(TorchDispatchMode):
        seen: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, found, counts = hostile(15, 37), [], []
    for mode in (nullcontext(), Look()):
        before = quantize_rows_columns.executions["cpu"], int8_scaled_mm.executions["cpu"]
        with mode:
            found.append(step(layer_of("reused_saved_stochastic", 37, 23), x, autocast=True))
        counts.append(
            (
                quantize_rows_columns.executions["cpu"] - before[0],
                int8_scaled_mm.executions["cpu"] - before[1],
            )
        )
    assert counts == [(4, 3), (4, 3)]  # x, W, g, and W again
    assert Look.seen.count("qtrain.int8_scaled_mm.default") == 3
    assert all(torch.equal(found[0][what], found[1][what]) for what in ("y", "dx", "dW", "db"))


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
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from qtrain.models.gpt import GPT, GPTConfig
from qtrain.nn import apply_recipe
from qtrain.quant import ModelRecipe

path, way, checkpointing = sys.argv[1:]
sr = "int8_row_sr"
linear = {"fprop": {"input": sr, "weight": sr}, "dgrad": {"grad_output": sr, "weight": "fprop"},
          "wgrad": {"grad_output": sr, "input": "fprop"}, "saved": "quantized"}
model = GPT(GPTConfig(vocab_size=61, sequence_tokens=16, layers=2, heads=2, width=32), seed=1)
recipe = ModelRecipe(linear=linear, compute="native", recompute_activations=way != "one")
report = apply_recipe(model, recipe, seed=5)
model.set_activation_checkpointing(checkpointing == "True")
tokens = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(1))
world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
if world > 1:
    dist.init_process_group("gloo")
if way == "ddp":
    model = DistributedDataParallel(model)
elif way == "fsdp2":
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
for micro in range(rank, 2, world):  # two micro-batches, by one process or by two
    report.clock.set(step=3, token_offset=32 * micro)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens[2 * micro : 2 * micro + 2, :-1])
    targets = tokens[2 * micro : 2 * micro + 2, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets)
    (loss if world > 1 else loss / 2).backward()
grads = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
grads = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}
if rank == 0:
    torch.save(grads, path)
if world > 1:
    dist.destroy_process_group()
"""


def gradients_of(way: str, folder: Path, *, checkpointing: bool) -> dict[str, torch.Tensor]:
    """Of one process or of two."""
    path, world = folder / f"{way}.pt", 1 if way == "one" else 2
    words = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(29500 + os.getpid() % 2000),
        "WORLD_SIZE": str(world),
    }
    arguments = [sys.executable, "-c", RANK, str(path), way, str(checkpointing)]
    ranks = [subprocess.Popen(arguments, env=os.environ | words | {"RANK": str(r)}) for r in range(world)]
    assert [process.wait(timeout=300) for process in ranks] == [0] * world
    return torch.load(path)


@pytest.mark.parametrize(("way", "checkpointing"), [("ddp", False), ("fsdp2", True)])
def test_two_processes_give_the_gradients_of_one(way: str, checkpointing: bool, tmp_path: Path) -> None:
    """And a layer that owns its activation those of one that does not."""
    one = gradients_of("one", tmp_path, checkpointing=False)
    two = gradients_of(way, tmp_path, checkpointing=checkpointing)
    assert one.keys() == two.keys()
    for name, grad in one.items():
        assert torch.allclose(grad, two[name], rtol=1e-6, atol=1e-9), name
