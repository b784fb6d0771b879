"""One linear layer, fprop + dgrad + wgrad, quantization included: native int8 beside bf16 autocast and fp32, and beside
the floor of the machine. And that machine's roof: GEMM rates and copy bandwidth, measured in the same run.

    floor = 3 * 2 T I O / (int8 rate) + (bytes of x, W, g read and y, dx, dW written, once each) / (copy bandwidth)

The int8 rate is that of the products alone, on registers; of a GEMM where the products are not ours. T tokens, I in, O out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from qtrain.quant import ModelRecipe

ARMS = ("fp32", "bf16", "native")
SHAPES = ((4096, 768, 3072), (4096, 3072, 768), (4096, 384, 1536), (2048, 1024, 4096))
"""T, I, O of a decoder's up and down projections at widths of 384, 768 and 1024."""

ROOF_SIZE = 1024  # of the square GEMMs of the roof: large enough to reach the rate, small enough for a second's rounds
COPY_BYTES = 1 << 26  # read, and as many written: beyond L2


def roof_functions() -> dict[str, tuple[Callable[[int], Any], float]]:
    """name -> (what is timed, operations or bytes of one call)."""
    import torch
    from qtrain_kernels.cpu_tier import tier
    from qtrain_kernels.int8_scaled_mm import int8_scaled_mm
    from qtrain_kernels.int8_scaled_mm_cpu import products_alone

    size, generator = ROOF_SIZE, torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (size, size), generator=generator, dtype=torch.int8)
    scale, single, source = torch.rand(size, generator=generator), codes.float(), torch.ones(COPY_BYTES // 4)
    half, target, operations = codes.bfloat16(), torch.empty_like(source), 2.0 * size**3
    alone = products_alone(tier())
    peak: dict[str, tuple[Callable[[int], Any], float]] = {}
    if alone is not None:
        multiply, products = alone
        peak["int8 peak"] = (lambda _: multiply(), products)
    return peak | {
        "int8 GEMM": (lambda _: int8_scaled_mm(codes, codes, scale, scale, None, torch.bfloat16), operations),
        "bf16 GEMM": (lambda _: half @ half.t(), operations),
        "fp32 GEMM": (lambda _: single @ single.t(), operations),
        "copy": (lambda _: target.copy_(source), 2.0 * COPY_BYTES),
    }


def roof_per_s(wall_ms: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Operations or bytes a second, from medians."""
    import numpy as np

    work = {name: amount for name, (_, amount) in roof_functions().items()}
    return {name: amount / (float(np.median(wall_ms[name])) * 1e-3) for name, amount in work.items()}


def roof_line(roof: Mapping[str, float]) -> str:
    rates = ", ".join(f"{name} {rate * 1e-9:.0f} Gop/s" for name, rate in roof.items() if name != "copy")
    return f"roof, measured in this run: {rates}, copy {roof['copy'] * 1e-9:.1f} GB/s (read + written)"


def floor_ms(shape: tuple[int, int, int], roof: Mapping[str, float]) -> float:
    """Of the native layer with bf16 activations: x, y, g, dx of 2 bytes, W and dW of 4."""
    T, I, O = shape
    moved = 2 * 2 * (T * I + T * O) + 2 * 4 * I * O
    rate = roof.get("int8 peak", roof["int8 GEMM"])
    return 1e3 * (3 * 2 * T * I * O / rate + moved / roof["copy"])


def linear_step(
    arm: str, shape: tuple[int, int, int], recipe: ModelRecipe, seed: int
) -> Callable[[int], None]:
    """A function that runs forward and backward of ``arm``, with new outputs and gradients each time."""
    import torch
    from torch import nn

    from qtrain.nn.surgery import apply_recipe

    T, I, O = shape
    torch.manual_seed(seed)
    layer = nn.Sequential(nn.Linear(I, O, bias=False))
    clock = apply_recipe(layer, recipe, seed=seed).clock if arm == "native" else None
    dtype = torch.float32 if arm == "fp32" else torch.bfloat16
    x = torch.randn(T, I).to(dtype).requires_grad_()
    g = torch.randn(T, O).to(dtype)

    def step(i: int) -> None:
        if clock is not None:
            clock.set(step=i)
        x.grad = layer[0].weight.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y: torch.Tensor = layer(x)
        y.backward(g)

    return step


def table(results: Mapping[tuple[int, int, int], Mapping[str, Any]]) -> str:
    """A Markdown table, one row a shape; intervals of 95 % in brackets."""
    lines = [
        "| T, I, O | fp32 ms | bf16 ms | native ms | floor ms | of floor | speed-up on bf16 | on fp32 | CPU time: on bf16 | on fp32 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for shape, r in results.items():
        times = " | ".join(f"{r['median_ms'][arm]:.1f}" for arm in ARMS)
        cells = [
            f"{r[key][base][0]:.2f} [{r[key][base][1]:.2f}, {r[key][base][2]:.2f}]"
            for key in ("speedup", "cpu_speedup")
            for base in ("bf16", "fp32")
        ]
        share = r["floor_ms"] / r["median_ms"]["native"]
        shown = ", ".join(map(str, shape))
        lines.append(f"| {shown} | {times} | {r['floor_ms']:.1f} | {share:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)
