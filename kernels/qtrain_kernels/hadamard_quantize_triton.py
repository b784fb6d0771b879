"""The Triton kernel of ``hadamard_quantize``: blocks of whole rows (``row_block_triton``).

A stage adds and subtracts neighbours and moves the lowest bit of their index to the top: (x_2i, x_2i+1) -> places i and
i + B / 2. After log2 B stages each bit of the index was the lowest once, in the order of the equation, and all are back in
their places (constant geometry: Pease, J. ACM 15, 1968): one form for all stages, and the same sums.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from qtrain_kernels import hadamard_quantize as declaration
from qtrain_kernels.aot import Build
from qtrain_kernels.rounding_triton import FORBIDDEN_PTX, INT8, OPTIONS, magnitude_bits
from qtrain_kernels.row_block_triton import keys_of_rows, rows_of_program, store_codes, store_scales, tile

ONE_PASS_COLUMNS = 16384  # the row in the registers of 16 warps


@triton.jit
def _transformed(
    x_ptr,
    signs_ptr,
    mask,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    NORM: tl.constexpr,
):
    """y float32 of a tile of whole blocks; 0 beyond the row."""
    x = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    if SIGNED:
        x = x * tl.load(signs_ptr, mask=mask, other=0.0)
    blocks: tl.constexpr = x.shape[0] * x.shape[1] // BLOCK
    y = x
    for _ in tl.static_range(LOG_BLOCK):
        even, odd = tl.split(tl.reshape(y, [blocks, BLOCK // 2, 2]))
        y = tl.reshape(tl.permute(tl.join(even + odd, even - odd), [0, 2, 1]), [blocks, BLOCK])
    return tl.reshape(y, x.shape) * NORM


@triton.jit(do_not_specialize=["qmax", "stream"])
def _hadamard_quantize_kernel(
    x_ptr,
    signs_ptr,
    codes_ptr,
    scale_ptr,
    seed_ptr,
    step_ptr,
    row_offset_ptr,
    R,
    C,
    stride_xr,
    stride_xc,
    qmax,
    stream,
    BLOCK: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    SIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ONE_PASS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row_index, row, in_rows, block = rows_of_program(R, BLOCK_R, BLOCK_C)
    x_row = x_ptr + row * stride_xr
    codes_row = codes_ptr + row * C

    if ONE_PASS:
        mask = in_rows & (block < C)
        y = _transformed(x_row + block * stride_xc, signs_ptr + block, mask, SIGNED, BLOCK, LOG_BLOCK, NORM)
        magnitude = magnitude_bits(y)
    else:
        magnitude = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
        for start in range(0, C, BLOCK_C):
            column = start + block
            mask = in_rows & (column < C)
            x = x_row + column * stride_xc
            y = _transformed(x, signs_ptr + column, mask, SIGNED, BLOCK, LOG_BLOCK, NORM)
            magnitude = tl.maximum(magnitude, magnitude_bits(y))
    inverse = store_scales(scale_ptr, magnitude, row_index, R, qmax, INT8)
    r0, r1 = keys_of_rows(seed_ptr, step_ptr, row_offset_ptr, stream, row, STOCHASTIC)
    if ONE_PASS:
        store_codes(codes_row + block, y, inverse, block, r0, r1, qmax, mask, INT8, STOCHASTIC)
    else:
        for start in range(0, C, BLOCK_C):
            column = start + block
            mask = in_rows & (column < C)
            x = x_row + column * stride_xc
            y = _transformed(x, signs_ptr + column, mask, SIGNED, BLOCK, LOG_BLOCK, NORM)
            store_codes(codes_row + column, y, inverse, column, r0, r1, qmax, mask, INT8, STOCHASTIC)


def _constants(block: int) -> dict[str, Any]:
    return {"BLOCK": block, "LOG_BLOCK": block.bit_length() - 1, "NORM": block**-0.5}


def launch(
    x: Tensor, signs: Tensor | None, block: int,
    qmax: int, stochastic: bool, seed: Tensor, step: Tensor, stream: int, row_offset: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``hadamard_quantize.reference`` by one kernel; nothing synchronizes. Strided signs are copied first."""
    codes, scale = declaration._fake(x, signs, block, qmax, stochastic, seed, step, stream, row_offset)
    R, C = x.shape
    if R == 0:
        return codes, scale
    sizes = tile(max(C, block), ONE_PASS_COLUMNS)
    _hadamard_quantize_kernel[(triton.cdiv(R, int(sizes["BLOCK_R"])),)](
        x, scale if signs is None else signs.contiguous(), codes, scale, seed, step, row_offset,
        R, C, x.stride(0), x.stride(1), qmax, stream,
        SIGNED=signs is not None, STOCHASTIC=stochastic, **_constants(block), **sizes, **OPTIONS,
    )  # fmt: skip
    return codes, scale


def builds() -> list[Build]:
    """Small and large blocks, rows in registers and in a loop, and any strides."""

    def build(C: int, block: int, signed: bool, stochastic: bool, strided: bool = False) -> Build:
        sizes: dict[str, Any] = tile(C, ONE_PASS_COLUMNS)
        options = {"num_warps": sizes.pop("num_warps"), **OPTIONS}
        types = {"x_ptr": "*bf16", "signs_ptr": "*fp32", "codes_ptr": "*i8", "scale_ptr": "*fp32"}
        types |= dict.fromkeys(("seed_ptr", "step_ptr", "row_offset_ptr"), "*i64")
        types |= dict.fromkeys(("R", "C", "stride_xr", "stride_xc", "qmax", "stream"), "i32")
        form = f"{', signs' if signed else ''}, {'stochastic' if stochastic else 'nearest'}"
        return Build(
            f"blocks of {block} of {C}{form}{', any strides' if strided else ''}",
            _hadamard_quantize_kernel,
            types,
            {"SIGNED": signed, "STOCHASTIC": stochastic, **_constants(block), **sizes}
            | ({} if strided else {"stride_xc": 1}),
            divisible_by_16=() if strided else ("x_ptr", "signs_ptr", "codes_ptr", "C", "stride_xr"),
            options=options,
            forbidden_ptx=FORBIDDEN_PTX,
            max_registers=254 if strided else 128,  # 64-bit addresses element by element
        )

    return [
        build(768, 16, False, False),
        build(4096, 64, True, True),
        build(4096, 1024, False, False),
        build(16384, 256, True, True),
        build(32768, 64, True, True),
        build(32768, 64, True, True, strided=True),
    ]
