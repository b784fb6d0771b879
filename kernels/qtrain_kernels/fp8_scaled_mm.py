"""fp8_scaled_mm: the product of two matrices of fp8 codes, with their scales, a bias and one rounding in its epilogue.

    y [M, N] = round((sum_k a [M, K] b [N, K]) * a_scale [M, 1]) * b_scale [1, N] + bias [1, N])

Codes are float8_e4m3fn or float8_e5m2, either mix except e5m2 with e5m2, which no library multiplies. The reference sums
exactly (products of codes in float64). Kernels sum in tensor cores: Hopper's keep about 14 bits between the products of
one instruction and the accumulator (DeepSeek-V3, arXiv:2412.19437, section 3.3.2), therefore partial sums of at most
128 products are added in float32. ``RTOL`` and ``ATOL`` bound every kernel.

A code that is NaN or infinite (e4m3fn has no infinity) shows in its row or column, as does a scale.

M, N free indices, K contraction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qtrain_kernels.int8_scaled_mm import OUT_DTYPES, epilogue
from qtrain_kernels.op import Workload, define_op
from qtrain_kernels.scaled_mm_workloads import cuda_workloads

CODES = (torch.float8_e4m3fn, torch.float8_e5m2)
E4M3, E5M2 = CODES
RTOL, ATOL = 2.0**-7, 0.01
"""One step of bfloat16, whose rounding may fall on either side. And the sums' own error on the cases below, whose codes have
unit variance and whose outputs have about unit variance: tensor cores cut each product to 2^-13 of the largest of an
instruction (about 16), 32 at a time, which adds up to about 0.006 sqrt(K / 32), and the scales divide by sqrt(K)."""


def check(
    a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype
) -> None:  # fmt: skip
    """Raise ValueError for arguments outside the op's domain; shapes and dtypes only, no data is read."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must be [M, K] and [N, K], not {list(a.shape)} and {list(b.shape)}")
    if a.dtype not in CODES or b.dtype not in CODES or a.dtype == b.dtype == E5M2:
        raise ValueError(
            f"a and b must be float8_e4m3fn or float8_e5m2, at most one of them e5m2, not {a.dtype} and {b.dtype}"
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

    ``a`` [M, K], ``b`` [N, K] float8, any strides; scales [M] and [N] float32, or [1], or None for no factor; bias [N]
    of a float dtype. Raises ValueError, see ``check``.
    """
    check(a, b, a_scale, b_scale, bias, out_dtype)
    sums = a.to(torch.float64) @ b.to(torch.float64).t()
    return epilogue(sums.to(torch.float32), a_scale, b_scale, bias, out_dtype)


def _fake(
    a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:  # fmt: skip
    check(a, b, a_scale, b_scale, bias, out_dtype)
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, torch.dtype]


def _codes(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1_000_003 + columns)
    return torch.randn(rows, columns, generator=generator).to(dtype)


def _scale(size: int, factor: float) -> Tensor:
    return (torch.rand(size, generator=torch.Generator().manual_seed(size)) + 0.25) * factor


def _set(x: Tensor, *places: tuple[int, int, float]) -> Tensor:
    for r, c, value in places:
        x[r, c] = torch.tensor(value).to(x.dtype)
    return x


def _case(
    M: int, N: int, K: int, dtype: torch.dtype, *, bias: torch.dtype | None = None, layout: str = "", scales: str = "",
    codes: tuple[torch.dtype, torch.dtype] = (E4M3, E4M3), not_finite: bool = False,
) -> Callable[[], Inputs]:  # fmt: skip
    def make() -> Inputs:
        a, b = _codes(M, K, codes[0]), _codes(N, K, codes[1])
        if layout == "transposed":
            a, b = a.t().contiguous().t(), b.t().contiguous().t()
        elif layout == "strided":
            a, b = _codes(2 * M, 2 * K, codes[0])[1::2, ::2], _codes(N + 3, K + 5, codes[1])[3:, 5:]
        elif layout == "expanded":
            b = _codes(1, K, codes[1]).expand(N, K)
        a_scale, b_scale = _scale(M, max(K, 1) ** -0.5), _scale(N, 1.0)
        if not_finite:
            a, b = _set(a, (2, 3, float("nan"))), _set(b, (1, 0, float("nan")))
            if E5M2 in codes:
                a = _set(a, (4, 1, float("inf")), (5, 1, float("-inf")))
            a_scale[7], b_scale[3] = float("nan"), float("inf")
        added = None if bias is None else torch.linspace(-3, 3, N).to(bias)
        if scales == "none":
            return a, b, None, None, added, dtype
        if scales == "tensor":
            a_scale, b_scale = a_scale[:1], b_scale[:1]
        elif scales == "mixed":
            a_scale, b_scale = a_scale[:1], b_scale
        return a, b, a_scale, b_scale, added, dtype

    return make


_F, _B = torch.float32, torch.bfloat16
_CASES: dict[str, Callable[[], Inputs]] = {
    **{
        f"{M}x{N}x{K}/{'bf16' if dtype == _B else 'fp32'}": _case(M, N, K, dtype, bias=bias)
        for (M, N, K), dtype, bias in (
            ((1, 1, 1), _F, None), ((1, 17, 3), _B, _F), ((17, 3, 65), _B, None), ((65, 17, 64), _F, _F),
            ((16, 48, 64), _B, None), ((32, 32, 128), _F, None), ((33, 49, 63), _B, _B), ((130, 65, 300), _F, _F),
            ((48, 96, 1040), _B, None), ((7, 16, 4100), _F, None),
        )
    },
    "e4m3 e5m2/fp32": _case(40, 48, 96, _F, codes=(E4M3, E5M2)),
    "e5m2 e4m3/bf16": _case(33, 20, 130, _B, codes=(E5M2, E4M3), bias=_F),
    "transposed/fp32": _case(35, 50, 70, _F, bias=_F, layout="transposed"),
    "transposed/bf16": _case(64, 96, 128, _B, layout="transposed"),
    "strided/bf16": _case(19, 33, 67, _B, bias=_F, layout="strided"),
    "expanded/fp32": _case(9, 20, 30, _F, layout="expanded"),
    "not_finite/fp32": _case(30, 20, 40, _F, bias=_F, not_finite=True),
    "not_finite e5m2/bf16": _case(32, 48, 64, _B, codes=(E5M2, E4M3), not_finite=True),
    "per_tensor/bf16": _case(20, 30, 40, _B, bias=_F, scales="tensor"),
    "per_tensor/fp32": _case(32, 48, 64, _F, scales="tensor"),
    "mixed scales/bf16": _case(32, 48, 64, _B, scales="mixed"),
    "no_scales/fp32": _case(20, 30, 1, _F, scales="none"),
    "no_rows/fp32": _case(0, 5, 7, _F),
    "no_columns/bf16": _case(5, 0, 7, _B),
    "no_contraction/fp32": _case(5, 6, 0, _F, bias=_F),
}  # fmt: skip


def _workloads(device: str) -> Sequence[Workload]:
    if device == "cuda":
        return cuda_workloads(lambda x: x.to(E4M3))
    M, N, K = 1024, 768, 768  # the eager reference alone runs there
    inputs = _case(M, N, K, _B)
    return [
        Workload(
            f"fprop/{M}x{N}x{K}",
            lambda on: inputs(),
            bytes=M * K + N * K + 2 * M * N,
            flops=2 * M * N * K,
        )
    ]


fp8_scaled_mm = define_op(
    "fp8_scaled_mm",
    reference,
    fake=_fake,
    cases=_CASES,
    workloads=_workloads,
    cuda="qtrain_kernels.fp8_scaled_mm_triton:launch",
    rtol=RTOL,
    atol=ATOL,
)
