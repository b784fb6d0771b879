"""fp8_scaled_mm: the product of two matrices of fp8 codes, with their scales, a bias and one rounding in its epilogue.

    y [M, N] = round((sum_k a [M, K] b [N, K]) * a_scale [M, 1]) * b_scale [1, N] + bias [1, N])

Codes are float8_e4m3fn or float8_e5m2, either mix except e5m2 with e5m2, which no library multiplies. The reference sums
exactly (products of codes in float64). Kernels sum in tensor cores: Hopper's keep about 14 bits between the products of
one instruction and the accumulator (DeepSeek-V3, arXiv:2412.19437, section 3.3.2), therefore partial sums of at most
128 products are added in float32. The bound stated here is that of ``ATOL`` for operands of unit variance.

A code that is NaN or infinite (e4m3fn has no infinity) shows in its row or column, as does a scale.

M, N free indices, K contraction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtrain_kernels.int8_scaled_mm import OUT_DTYPES, epilogue

CODES = (torch.float8_e4m3fn, torch.float8_e5m2)
E4M3, E5M2 = CODES
PROMOTED = 128
"""Products that are summed in the tensor core before float32 takes over (DeepSeek-V3, as above)."""

RTOL, ATOL = 2.0**-7, 0.02
"""One step of bfloat16, whose rounding may fall on the other side; and the sums' own error, for the cases below: products
of unit variance times scales of at most 1, up to K = 4100. Truncation to 2^-13 of the largest product (about 16) a term,
32 terms an instruction, random, 128 of those a row: below 16 * 2^-13 * sqrt(32 * 128) = 0.125 at most and a tenth of it
as measured on cases of this size."""


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
