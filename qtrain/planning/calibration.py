"""``device=this``: the rates of the machine that plans, from medians of short runs: large GEMMs, fused attention, elementwise
work with new outputs (as eager code has; on a CPU the memory for them is most of it), and a tiny operation's time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .devices import GIB, Device

_SIZE = {"cpu": 1024, "cuda": 8192}  # of square GEMMs
_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}  # of float32 in elementwise work
_HEADS = {"cpu": (4, 8, 256, 64), "cuda": (8, 32, 2048, 128)}  # B, H, S, D of attention
_SECONDS = 0.3  # of each measurement, at least three calls


def median_seconds(run: Callable[[], Any], device_type: str) -> float:
    """Of one call, after one that warms up."""

    def synchronize() -> None:
        if device_type == "cuda":
            torch.cuda.synchronize()

    run()
    synchronize()
    samples: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(samples) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        synchronize()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def _gemms(device_type: str, scale: float) -> dict[str, float]:
    """TFLOP/s by precision."""
    from qtrain_kernels.int8_scaled_mm import int8_scaled_mm

    n = int(_SIZE[device_type] * scale)
    single = torch.randn(n, n, device=device_type)
    half = single.bfloat16()
    runs: dict[str, Callable[[], Any]] = {"bf16": lambda: half @ half.t(), "fp32": lambda: single @ single.t()}
    if device_type in int8_scaled_mm.kernels:
        codes = torch.randint(-127, 128, (n, n), dtype=torch.int8, device=device_type)
        ones = torch.ones(n, device=device_type)
        runs["int8"] = lambda: int8_scaled_mm(codes, codes, ones, ones, None, torch.bfloat16)
    return {name: 2e-12 * n**3 / median_seconds(run, device_type) for name, run in runs.items()}


def _quantize_bytes_per_s(x: torch.Tensor) -> float:
    """Of codes along rows and columns: read twice, and both written, as ``operations`` counts."""
    from qtrain_kernels.quantize_rows_columns import quantize_rows_columns

    matrix = x[: x.numel() // 1024 * 1024].reshape(-1, 1024).bfloat16()
    zero = torch.zeros((), dtype=torch.int64, device=x.device)
    side = (127, False, False, 0, None)
    seconds = median_seconds(lambda: quantize_rows_columns(matrix, *side, *side, zero, zero, zero), x.device.type)
    return 6 * matrix.numel() / seconds


def calibrated(device_type: str | None = None, *, scale: float = 1.0) -> Device:
    """The device that is here: CUDA where there is some. scale: of the sizes, for tests. Takes seconds."""
    kind = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    b, h, s, d = _HEADS[kind]
    q = torch.randn(b, h, max(16, int(s * scale)), d, device=kind, dtype=torch.bfloat16)
    attention = median_seconds(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True), kind)
    x = torch.ones(int(_ELEMENTS[kind] * scale), device=kind)
    elementwise = median_seconds(lambda: x * x, kind)
    elementwise_bytes_per_s = 2 * 4 * x.numel() / elementwise
    quantize = _quantize_bytes_per_s(x)
    one = torch.ones(8, device=kind)
    tiny = median_seconds(lambda: [one * one for _ in range(100)], kind) / 100
    return Device(
        name=_name(kind),
        type=kind,
        capability=None if kind == "cpu" else float("{}.{}".format(*torch.cuda.get_device_capability())),
        memory_gib=_memory(kind) / GIB,
        peak_tflops={},
        gemm_tflops=_gemms(kind, scale),
        attention_tflops=1e-12 * 2 * q.numel() * q.shape[2] / attention,  # half of both products: causal
        copy_gb_per_s=1e-9 * elementwise_bytes_per_s,
        quantize_fraction=min(1.0, quantize / elementwise_bytes_per_s),
        kernel_us=tiny * 1e6,
        host_us=0.0 if kind == "cpu" else tiny * 1e6,
        gpus_per_node=1 if kind == "cpu" else torch.cuda.device_count(),
        link_gb_per_s=1.0,
        node_gb_per_s=1.0,
        link_us=100.0,
        node_us=100.0,
        measured=f"GEMMs, attention, elementwise work and overhead, now, on {torch.get_num_threads()} thread(s)",
        sources="links and latencies: assumed",
    )


def _name(kind: str) -> str:
    return "this CPU" if kind == "cpu" else torch.cuda.get_device_name()


def _memory(kind: str) -> int:
    if kind == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
