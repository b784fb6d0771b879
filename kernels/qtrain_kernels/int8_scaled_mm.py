"""int8_scaled_mm: the product of two int8 matrices, with their scales, a bias and one rounding in its epilogue.

    y [M, N] = round((float32(a [M, K] . b [N, K]^T) * a_scale [M, 1]) * b_scale [1, N] + bias [1, N])

The sum is exact (int32), and each operation after it rounds once to float32: every implementation gives the same bits,
whatever its order of summation and the number of threads. A scale that is not finite belongs to a row of zeros
(``quantize_rows``), and 0 * inf = 0 * NaN = NaN: what was not finite stays visible in its row or column.

Both operands are K-major; another layout (b as the transpose of [K, N]) is read as it lies and packed by the kernel.

M, N free indices, K contraction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qtrain_kernels.op import Workload, define_op
from qtrain_kernels.scaled_mm_workloads import cuda_workloads, gemms

MAX_K = 2**17 - 1
"""A product of two codes is at most 2^14, so that sums of fewer than 2^17 fit into int32."""

OUT_DTYPES = (torch.float32, torch.bfloat16)


def check(
    a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype
) -> None:  # fmt: skip
    """Raise ValueError for arguments outside the op's domain; shapes and dtypes only, no data is read."""
    if (
        a.dim() != 2
        or b.dim() != 2
        or a.dtype != torch.int8
        or b.dtype != torch.int8
        or a.shape[1] != b.shape[1]
    ):
        raise ValueError(
            f"a and b must be int8 [M, K] and [N, K], not {list(a.shape)} {a.dtype} and {list(b.shape)} {b.dtype}"
        )
    if a.shape[1] > MAX_K:
        raise ValueError(
            f"K={a.shape[1]}: sums of more than {MAX_K} products may leave int32; split the contraction"
        )
    for name, vector, size in (("a_scale", a_scale, a.shape[0]), ("b_scale", b_scale, b.shape[0])):
        if vector is not None and (vector.shape not in ((size,), (1,)) or vector.dtype != torch.float32):
            raise ValueError(
                f"{name} must be [{size}] or [1] float32, not {list(vector.shape)} {vector.dtype}"
            )
    if bias is not None and (bias.shape != (b.shape[0],) or not bias.is_floating_point()):
        raise ValueError(f"bias must be [{b.shape[0]}] of a float dtype, not {list(bias.shape)} {bias.dtype}")
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"out_dtype={out_dtype}: allowed are {', '.join(map(str, OUT_DTYPES))}")


def reference(
    a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """-> y [M, N] in ``out_dtype`` (float32 or bfloat16), contiguous.

    ``a`` [M, K], ``b`` [N, K] int8, any strides; scales [M] and [N] float32, or [1], or None for no factor; bias [N]
    of a float dtype. Raises ValueError, see ``check``.
    """
    check(a, b, a_scale, b_scale, bias, out_dtype)
    # Sums of integers below 2^53 are exact in float64
    sums = a.to(torch.float64) @ b.to(torch.float64).t()
    return epilogue(sums.to(torch.float32), a_scale, b_scale, bias, out_dtype)


def epilogue(
    y: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Of sums [M, N] float32, which are overwritten."""
    if a_scale is not None:
        y.mul_(a_scale[:, None])
    if b_scale is not None:
        y.mul_(b_scale)
    if bias is not None:
        y.add_(bias.to(torch.float32))
    return y.to(out_dtype)


def _fake(
    a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:  # fmt: skip
    check(a, b, a_scale, b_scale, bias, out_dtype)
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, torch.dtype]


def _codes(rows: int, columns: int) -> Tensor:
    """Uniform, -128 included."""
    generator = torch.Generator().manual_seed(rows * 1_000_003 + columns)
    return torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)


def _scale(size: int, *, hostile: bool = False) -> Tensor:
    scale = torch.rand(size, generator=torch.Generator().manual_seed(size)) * 1e-2 + 1e-4
    if hostile:
        for i, value in enumerate((float("nan"), float("inf"), 2.0**-100, 1e-42)):
            scale[i * 7 % size] = value
    return scale


def _case(
    M: int, N: int, K: int, dtype: torch.dtype, *, bias: torch.dtype | None = None, layout: str = "", scales: str = ""
) -> Callable[[], Inputs]:  # fmt: skip
    def make() -> Inputs:
        a, b = _codes(M, K), _codes(N, K)
        if layout == "transposed":
            a, b = a.t().contiguous().t(), b.t().contiguous().t()
        elif layout == "strided":
            a, b = _codes(2 * M, 2 * K)[1::2, ::2], _codes(N + 3, K + 5)[3:, 5:]
        elif layout == "expanded":
            b = _codes(1, K).expand(N, K)
        hostile = scales == "hostile"
        if hostile:  # a scale that is not finite belongs to a row of zeros
            a[_scale(M, hostile=True).isfinite().logical_not()] = 0
        a_scale, b_scale = _scale(M, hostile=hostile), _scale(N)
        if scales == "none":
            return a, b, None, None, None, dtype
        if scales == "tensor":
            a_scale, b_scale = a_scale[:1], b_scale[:1]
        added = None if bias is None else torch.linspace(-3, 3, N).to(bias)
        return a, b, a_scale, b_scale, added, dtype

    return make


def _extreme() -> Inputs:
    """The largest sums: 2^14 * 1000, and their negatives."""
    a, b = torch.full((9, 1000), -128, dtype=torch.int8), torch.full((5, 1000), -128, dtype=torch.int8)
    b[1::2] = 127
    return a, b, None, None, None, torch.float32


_F, _B = torch.float32, torch.bfloat16
_CASES: dict[str, Callable[[], Inputs]] = {
    **{
        f"{M}x{N}x{K}/{'bf16' if dtype == _B else 'fp32'}": _case(M, N, K, dtype, bias=bias)
        for (M, N, K), dtype, bias in (
            ((1, 1, 1), _F, None), ((1, 17, 3), _B, _F), ((3, 65, 17), _F, _B), ((17, 3, 65), _B, None),
            ((65, 17, 64), _F, _F), ((8, 48, 64), _B, _B), ((32, 32, 128), _F, None), ((33, 49, 63), _B, _F),
            ((130, 65, 300), _F, _F), ((40, 100, 1100), _B, _F), ((7, 16, 4100), _F, None),
        )
    },
    "transposed/fp32": _case(35, 50, 70, _F, bias=_F, layout="transposed"),
    "transposed/bf16": _case(64, 96, 128, _B, layout="transposed"),
    "strided/bf16": _case(19, 33, 67, _B, bias=_F, layout="strided"),
    "expanded/fp32": _case(9, 20, 30, _F, layout="expanded"),
    "not_finite/fp32": _case(30, 20, 40, _F, bias=_F, scales="hostile"),
    "not_finite/bf16": _case(30, 20, 40, _B, scales="hostile"),
    "not_finite_wide/bf16": _case(30, 70, 40, _B, scales="hostile"),
    "per_tensor/bf16": _case(20, 30, 40, _B, bias=_F, scales="tensor"),
    "no_scales/fp32": _case(20, 30, 40, _F, scales="none"),
    "extreme/fp32": _extreme,
    "no_rows/fp32": _case(0, 5, 7, _F),
    "no_columns/bf16": _case(5, 0, 7, _B),
    "no_contraction/fp32": _case(5, 6, 0, _F, bias=_F),
}  # fmt: skip


def _plain(dtype: torch.dtype) -> Callable[[tuple[Any, ...]], Callable[[], Any]]:
    """The same product in a higher precision, without scales."""

    def make(inputs: tuple[Any, ...]) -> Callable[[], Any]:
        a, b = (codes.to(dtype) for codes in inputs[:2])
        return lambda: a @ b.t()

    return make


def _with_torch(inputs: tuple[Any, ...]) -> Callable[[], Any]:
    from qtrain_kernels.cpu_tier import Tier
    from qtrain_kernels.int8_scaled_mm_cpu import launch

    a, b, a_scale, b_scale, bias, dtype = inputs
    return lambda: launch(a, b, a_scale, b_scale, bias, dtype, Tier("torch", "", None))


def _workloads(device: str) -> Sequence[Workload]:
    if device == "cuda":
        return cuda_workloads(lambda x: (x * 32).round().clamp(-127, 127).to(torch.int8))
    rivals = {
        "bf16 GEMM": _plain(torch.bfloat16),
        "fp32 GEMM": _plain(torch.float32),
        "torch._int_mm": _with_torch,
    }

    def workload(name: str, M: int, N: int, K: int, dtype: torch.dtype) -> Workload:
        make = _case(M, N, K, dtype)
        traffic = M * K + N * K + M * N * dtype.itemsize
        return Workload(
            f"{name}/{M}x{N}x{K}", lambda on: make(), bytes=traffic, flops=2 * M * N * K, rivals=rivals
        )

    # T, I, O of the linear layers that the CPU path was designed on
    return [workload(*gemm) for gemm in gemms([(4096, 768, 3072), (4096, 384, 1536)])]


int8_scaled_mm = define_op(
    "int8_scaled_mm",
    reference,
    fake=_fake,
    cases=_CASES,
    workloads=_workloads,
    cuda="qtrain_kernels.int8_scaled_mm_triton:launch",
    cpu="qtrain_kernels.int8_scaled_mm_cpu:launch",
)
