"""The GEMMs of linear layers on which the scaled GEMMs are timed on a GPU, and what is timed beside them.

T tokens, I in, O out: fprop y [T, O], dgrad dx [T, I], wgrad dW [O, I] (float32). The large layers are those of
TransformerEngine's published table (T = 15872), the small ones GPT-2 124M's with 16 sequences of 1024 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qtrain_kernels.op import Workload

LAYERS = [(15872, 4096, 12288), (15872, 4096, 4096), (15872, 4096, 16384), (15872, 16384, 4096)]
GPT2_LAYERS = [(16384, 768, 2304), (16384, 768, 768), (16384, 768, 3072), (16384, 3072, 768)]
BF16, FP32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn

Rival = Callable[[tuple[Any, ...]], Callable[[], Any]]


def gemms(layers: list[tuple[int, int, int]]) -> Iterator[tuple[str, int, int, int, torch.dtype]]:
    """(name, M, N, K, output) of the three GEMMs of each layer."""
    for T, I, O in layers:
        yield "fprop", T, O, I, BF16
        yield "dgrad", T, I, O, BF16
        yield "wgrad", O, I, T, FP32


def cuda_workloads(codes: Callable[[Tensor], Tensor]) -> list[Workload]:
    """``codes``: normal values [R, K] -> codes of the op."""

    def workload(name: str, M: int, N: int, K: int, dtype: torch.dtype) -> Workload:
        def inputs(on: str) -> tuple[Any, ...]:
            generator = torch.Generator(on).manual_seed(0)
            a, b = (codes(torch.randn(rows, K, device=on, generator=generator)) for rows in (M, N))
            scales = (torch.rand(rows, device=on, generator=generator) * 1e-2 + 1e-4 for rows in (M, N))
            return a, b, *scales, None, dtype

        traffic = M * K + N * K + M * N * dtype.itemsize
        return Workload(f"{name}/{M}x{N}x{K}", inputs, bytes=traffic, flops=2 * M * N * K, rivals=RIVALS)

    return [workload(*gemm) for gemm in gemms(LAYERS + GPT2_LAYERS)]


def _bf16(inputs: tuple[Any, ...]) -> Callable[[], Any]:
    a, b = (codes.to(BF16) for codes in inputs[:2])
    return lambda: torch.mm(a, b.t())


def _int_mm(inputs: tuple[Any, ...]) -> Callable[[], Any]:
    """int32 sums, without scales."""
    a, b = (codes.to(torch.int8) for codes in inputs[:2])
    return lambda: torch._int_mm(a, b.t())


def _scaled_mm(of_rows: bool) -> Rival:
    """With scales of rows torch gives bfloat16 alone, so that its wgrad writes half of the op's bytes."""

    def make(inputs: tuple[Any, ...]) -> Callable[[], Any]:
        a, b = (codes if codes.dtype == E4M3 else (codes / 16).to(E4M3) for codes in inputs[:2])
        left, right, dtype = inputs[2][:, None], inputs[3][None, :], BF16
        if not of_rows:
            left, right, dtype = inputs[2][0], inputs[3][0], inputs[5]
        return lambda: torch._scaled_mm(a, b.t(), left, right, out_dtype=dtype, use_fast_accum=False)

    return make


RIVALS: dict[str, Rival] = {
    "cuBLAS bf16": _bf16,
    "torch._int_mm": _int_mm,
    "torch._scaled_mm, rows": _scaled_mm(True),
    "torch._scaled_mm, tensors": _scaled_mm(False),
}
