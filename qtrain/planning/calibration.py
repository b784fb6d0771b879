"""``hardware=this``: the rates of the machine that plans, from medians of short runs: large GEMMs, fused attention, elementwise
work with new outputs (as eager code has; on a CPU the memory for them is most of it), and a tiny operation's time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .devices import FP8_CAPABILITIES, GIB, Device
from .operations import BACKWARD_PRODUCTS

_SIZE = {"cpu": 1024, "cuda": 8192}  # of square GEMMs
_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}  # of float32 in elementwise work
_HEADS = {"cpu": 32, "cuda": 256}  # B H of attention
# Of one machine's devices nothing is measured that takes two: round numbers stand for these
LINKS = ("link_gb_per_s", "link_us", "node_gb_per_s", "node_us")
_SECONDS = 0.3  # of each measurement, at least three calls


def clock(device_type: str) -> float:
    """Seconds: on CUDA of the wall, when all that was launched is done; on a CPU of one thread's processor time, since other
    programs stretch the wall clock (all threads' time over their number)."""
    if device_type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


def median_seconds(run: Callable[[], Any], device_type: str) -> float:
    """Of one call by ``clock``, after one that warms up."""
    run()
    samples: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(samples) < 3 or time.perf_counter() < end:
        start = clock(device_type)
        run()
        samples.append(clock(device_type) - start)
    return statistics.median(samples)


def _gemms(device_type: str, capability: float | None, scale: float) -> tuple[dict[str, float], float]:
    """(TFLOP/s by precision of large square ones, microseconds that a narrow bf16 one takes beyond its rate)."""
    from qtrain_kernels.fp8_scaled_mm import fp8_scaled_mm
    from qtrain_kernels.int8_scaled_mm import int8_scaled_mm

    n = int(_SIZE[device_type] * scale)
    single = torch.randn(n, n, device=device_type)
    half = single.bfloat16()
    runs: dict[str, Callable[[], Any]] = {
        "bf16": lambda: half @ half.t(),
        "fp32": lambda: single @ single.t(),
    }
    ones = torch.ones(n, device=device_type)
    if device_type in int8_scaled_mm.kernels:
        codes = torch.randint(-127, 128, (n, n), dtype=torch.int8, device=device_type)
        runs["int8"] = lambda: int8_scaled_mm(codes, codes, ones, ones, None, torch.bfloat16)
    if int(capability or 0) in FP8_CAPABILITIES:
        floats = single.to(torch.float8_e4m3fn)
        runs["fp8"] = lambda: fp8_scaled_mm(floats, floats, ones, ones, None, torch.bfloat16)
    rates = {name: 2e-12 * n**3 / median_seconds(run, device_type) for name, run in runs.items()}
    narrow = half[: max(1, n // 4), : max(1, n // 4)].contiguous()
    seconds = median_seconds(lambda: half[:, : narrow.shape[1]] @ narrow.t(), device_type)
    work = 2e-12 * n * narrow.shape[0] * narrow.shape[1]
    return rates, max(0.0, 1e6 * (seconds - work / rates["bf16"]))


def _elementwise(device_type: str, scale: float) -> float:
    """Bytes a second of a mixture of what eager models do: products, casts, transposed copies, an activation."""
    x = torch.randn(max(1, int(_ELEMENTS[device_type] * scale)) // 1024 + 1, 4, 256, device=device_type)
    half, n = x.bfloat16(), x.numel()
    runs: list[tuple[int, Callable[[], Any]]] = [
        (8 * n, lambda: x * x),
        (6 * n, x.bfloat16),
        (8 * n, lambda: x.transpose(0, 1).contiguous()),
        (4 * n, lambda: F.gelu(half)),
    ]
    return sum(nbytes for nbytes, _ in runs) / sum(median_seconds(run, device_type) for _, run in runs)


def _overhead(device_type: str) -> float:
    """Microseconds of an operation on eight numbers, forward and backward."""
    one = torch.ones(8, device=device_type, requires_grad=True)
    many = 50

    def run() -> None:
        x = one
        for _ in range(many):
            x = x * one
        x.backward(one)

    return 1e6 * median_seconds(run, device_type) / (4 * many)  # one product forward, two and a sum backward


def _quantize_bytes_per_s(x: torch.Tensor) -> float:
    """Of codes along rows and columns: read twice, and both written, as ``operations`` counts."""
    from qtrain_kernels.quantize_rows_columns import quantize_rows_columns

    matrix = x[: x.numel() // 1024 * 1024].reshape(-1, 1024).bfloat16()
    zero = torch.zeros((), dtype=torch.int64, device=x.device)
    side = (127, False, False, 0, None)
    seconds = median_seconds(
        lambda: quantize_rows_columns(matrix, *side, *side, zero, zero, zero), x.device.type
    )
    return 6 * matrix.numel() / seconds


def calibrated(
    device_type: str | None = None, *, sequence_tokens: int = 1024, head_width: int = 64, scale: float = 1.0
) -> Device:
    """The device that is here: CUDA where there is some. sequence_tokens, head_width: of attention, whose rate depends on
    them much. scale: of the sizes, for tests. Takes seconds."""
    kind = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    shape = (max(1, int(_HEADS[kind] * scale)) // 4 + 1, 4, max(16, int(sequence_tokens * scale)), head_width)
    q, k, v = (torch.randn(shape, device=kind, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    attention = median_seconds(
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(q), kind
    )
    elementwise = _elementwise(kind, scale)
    quantize = _quantize_bytes_per_s(torch.randn(max(1024, int(_ELEMENTS[kind] * scale)), device=kind))
    capability = None if kind == "cpu" else float("{}.{}".format(*torch.cuda.get_device_capability()))
    tiny, (rates, narrow) = _overhead(kind), _gemms(kind, capability, scale)
    return Device(
        name=_name(kind),
        type=kind,
        capability=capability,
        memory_gib=_memory(kind) / GIB,
        peak_tflops={},
        gemm_tflops=rates,
        attention_tflops=1e-12
        * (1 + BACKWARD_PRODUCTS)
        * 2
        * q.numel()
        * q.shape[2]
        / attention,  # half of each: causal
        copy_gb_per_s=1e-9 * elementwise,
        quantize_fraction=min(1.0, quantize / elementwise),
        kernel_us=tiny,
        gemm_us=max(tiny, narrow),
        host_us=0.0 if kind == "cpu" else tiny,
        gpus_per_node=1 if kind == "cpu" else torch.cuda.device_count(),
        link_gb_per_s=1.0,
        node_gb_per_s=1.0,
        link_us=100.0,
        node_us=100.0,
        measured=f"GEMMs, attention, elementwise work and overhead, now, on {torch.get_num_threads()} thread(s)"
        f"{', by processor time' if kind == 'cpu' else ''}",
        sources="links and latencies: assumed",
        unknown=LINKS,
    )


def _name(kind: str) -> str:
    return "this CPU" if kind == "cpu" else torch.cuda.get_device_name()


def _memory(kind: str) -> int:
    if kind == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
