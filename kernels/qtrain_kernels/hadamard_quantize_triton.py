"""The Triton kernel of ``hadamard_quantize``: one program takes BLOCK_R whole rows, as in ``quantize_rows_triton``.

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
from qtrain_kernels.counter_hash_triton import key, row_keys
from qtrain_kernels.quantize_rows_triton import tile
from qtrain_kernels.rounding_triton import (
    FORBIDDEN_PTX,
    INT8,
    OPTIONS,
    codes,
    inverse_of,
    magnitude_bits,
    scale_of,
)

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
    row_index = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = tl.expand_dims(row_index, 1)  # [BLOCK_R, 1]
    in_rows = row < R
    block = tl.expand_dims(tl.arange(0, BLOCK_C), 0).to(tl.int64)  # [1, BLOCK_C]
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
    scale = scale_of(tl.max(magnitude, axis=1), qmax, INT8)  # [BLOCK_R]
    tl.store(scale_ptr + row_index, scale, mask=row_index < R)
    inverse = tl.expand_dims(inverse_of(scale), 1)
    finite = inverse > 0.0
    if STOCHASTIC:
        k0, k1 = key(tl.load(seed_ptr), tl.load(step_ptr), stream)
        r0, r1 = row_keys(row + tl.load(row_offset_ptr), k0, k1)
    else:
        r0, r1 = 0, 0
    if ONE_PASS:
        code = tl.where(finite, codes(y, inverse, block, r0, r1, qmax, INT8, STOCHASTIC), 0)
        tl.store(codes_row + block, code.to(tl.int8), mask=mask)
    else:
        for start in range(0, C, BLOCK_C):
            column = start + block
            mask = in_rows & (column < C)
            x = x_row + column * stride_xc
            y = _transformed(x, signs_ptr + column, mask, SIGNED, BLOCK, LOG_BLOCK, NORM)
            code = tl.where(finite, codes(y, inverse, column, r0, r1, qmax, INT8, STOCHASTIC), 0)
            tl.store(codes_row + column, code.to(tl.int8), mask=mask)


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
