"""The copy of an 8-bit operand to K-major layout, rows of a multiple of 16 bytes: what tensor cores and descriptors read.

Hopper's wgmma takes 8-bit operands K-major alone; cuBLAS, given another layout, is several times slower. One pass of
tiles that are read along the source's rows or columns, whichever are contiguous, and written along K. Bytes are moved,
never converted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtrain_kernels.aot import Build

ALIGNMENT = 16  # bytes, of tensor descriptors (CUDA driver API, cuTensorMapEncodeTiled: strides and address)
BLOCK_R, BLOCK_C, WARPS = 256, 64, 8  # 3909 GB/s of a transposed operand on an H200; 128 x 128, 4 warps: 3584


@triton.jit
def _k_major_kernel(
    x_ptr, y_ptr, R, C, stride_xr, stride_xc, stride_yr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """[R, C] bytes of any strides -> rows of C bytes, stride_yr apart."""
    tiles = tl.cdiv(C, BLOCK_C)
    row = tl.expand_dims((tl.program_id(0) // tiles) * BLOCK_R + tl.arange(0, BLOCK_R), 1)
    column = tl.expand_dims((tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C), 0)
    mask = (row < R) & (column < C)
    row, column = row.to(tl.int64), column.to(tl.int64)
    x = tl.load(x_ptr + row * stride_xr + column * stride_xc, mask=mask)
    tl.store(y_ptr + row * stride_yr + column, x, mask=mask)


def k_major(x: Tensor) -> Tensor:
    """[R, C] of a 1-byte dtype -> the same with unit stride along C and rows of a multiple of 16 bytes; ``x`` itself
    where it is so already. The padding between rows is not written: nothing reads it."""
    aligned = x.stride(0) % ALIGNMENT == 0 and x.stride(0) >= x.shape[1] and x.data_ptr() % ALIGNMENT == 0
    if x.stride(1) == 1 and aligned:
        return x
    R, C = x.shape
    pitch = triton.cdiv(C, ALIGNMENT) * ALIGNMENT
    y = torch.empty((R, pitch), dtype=torch.int8, device=x.device)
    grid = (triton.cdiv(R, BLOCK_R) * triton.cdiv(C, BLOCK_C),)
    _k_major_kernel[grid](
        x.view(torch.int8), y, R, C, x.stride(0), x.stride(1), pitch,
        BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C, num_warps=WARPS,
    )  # fmt: skip
    return y.view(x.dtype)[:, :C]


def k_major_build() -> Build:
    """Of an operand that lies transposed."""
    types = {"x_ptr": "*i8", "y_ptr": "*i8", **dict.fromkeys(("R", "C", "stride_xc", "stride_yr"), "i32")}
    constants = {"stride_xr": 1, "BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C}
    return Build(
        "transposed copy",
        _k_major_kernel,
        types,
        constants,
        divisible_by_16=tuple(types),
        options={"num_warps": WARPS},
        required_ptx={80: (), 90: ()},
    )
