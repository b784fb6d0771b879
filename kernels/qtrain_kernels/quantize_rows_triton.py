"""The Triton kernel of ``quantize_rows``: one program takes BLOCK_R whole rows.

Rows that fit one block stay in registers between the maximum and the codes; longer rows are read twice, the
second time mostly from L2. What makes it bit-equal to the reference on every input is in ``rounding_triton``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtrain_kernels import quantize_rows as declaration
from qtrain_kernels.aot import Build
from qtrain_kernels.counter_hash_triton import key, row_keys
from qtrain_kernels.rounding_triton import (
    FORBIDDEN_PTX,
    INT8,
    OPTIONS,
    codes,
    inverse_of,
    magnitude_bits,
    scale_of,
)

# 32 elements a thread: enough independent loads in flight, and the row of one pass fits the registers.
ELEMENTS_PER_WARP = 32 * 32
ONE_PASS_COLUMNS = 8192
LOOP_COLUMNS = 4096
SHORT_TILE = 4096


@triton.jit
def _load(x_row, fold_ptr, column, stride_xc, mask, C, FOLDED: tl.constexpr):
    x = tl.load(x_row + column * stride_xc, mask=mask, other=0.0).to(tl.float32)
    if FOLDED:
        x = x * tl.load(fold_ptr + column, mask=column < C, other=0.0)
    return x


@triton.jit(do_not_specialize=["qmax", "stream"])
def _quantize_rows_kernel(
    x_ptr,
    fold_ptr,
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
    FORMAT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    FOLDED: tl.constexpr,
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
        x = _load(x_row, fold_ptr, block, stride_xc, mask, C, FOLDED)
        magnitude = magnitude_bits(x)
    else:
        magnitude = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
        for start in range(0, C, BLOCK_C):
            column = start + block
            mask = in_rows & (column < C)
            x = _load(x_row, fold_ptr, column, stride_xc, mask, C, FOLDED)
            magnitude = tl.maximum(magnitude, magnitude_bits(x))
    scale = scale_of(tl.max(magnitude, axis=1), qmax, FORMAT)  # [BLOCK_R]
    tl.store(scale_ptr + row_index, scale, mask=row_index < R)
    inverse = tl.expand_dims(inverse_of(scale), 1)
    finite = inverse > 0.0

    if STOCHASTIC:
        k0, k1 = key(tl.load(seed_ptr), tl.load(step_ptr), stream)
        r0, r1 = row_keys(row + tl.load(row_offset_ptr), k0, k1)
    else:
        r0, r1 = 0, 0
    if ONE_PASS:
        code = tl.where(finite, codes(x, inverse, block, r0, r1, qmax, FORMAT, STOCHASTIC), 0)
        tl.store(codes_row + block, code.to(tl.int8), mask=mask)
    else:
        for start in range(0, C, BLOCK_C):
            column = start + block
            mask = in_rows & (column < C)
            x = _load(x_row, fold_ptr, column, stride_xc, mask, C, FOLDED)
            code = tl.where(finite, codes(x, inverse, column, r0, r1, qmax, FORMAT, STOCHASTIC), 0)
            tl.store(codes_row + column, code.to(tl.int8), mask=mask)


def tile(C: int, one_pass_columns: int = ONE_PASS_COLUMNS) -> dict[str, int | bool]:
    """The block sizes and warps for rows of ``C`` columns, which stay in registers up to ``one_pass_columns``."""
    one_pass = one_pass_columns >= C
    BLOCK_C = max(16, triton.next_power_of_2(C)) if one_pass else LOOP_COLUMNS
    BLOCK_R = max(1, SHORT_TILE // BLOCK_C)
    num_warps = BLOCK_R * BLOCK_C // ELEMENTS_PER_WARP
    return {"ONE_PASS": one_pass, "BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C, "num_warps": num_warps}


def launch(
    x: Tensor, qmax: int, stochastic: bool, seed: Tensor, step: Tensor, stream: int, row_offset: Tensor
) -> tuple[Tensor, Tensor]:
    """``quantize_rows.reference`` by one kernel; the scalars are read on the device, nothing synchronizes."""
    declaration.check(x, qmax, stochastic, seed, step, stream, row_offset)
    R, C = x.shape
    codes = torch.empty((R, C), dtype=torch.int8, device=x.device)
    scale = torch.empty((R,), dtype=torch.float32, device=x.device)
    quantize(x, None, codes, scale, qmax, INT8.value, stochastic, seed, step, stream, row_offset)
    return codes, scale


def quantize(
    x: Tensor, fold: Tensor | None, codes: Tensor, scale: Tensor, qmax: int, number_format: int, stochastic: bool,
    seed: Tensor, step: Tensor, stream: int, row_offset: Tensor,
) -> None:  # fmt: skip
    """Write ``codes`` [R, C] int8 (the bytes of ``number_format``) and ``scale`` [R] of x * fold; ``fold`` [C] float32,
    contiguous, or None. The arguments are not checked."""
    R, C = x.shape
    if R == 0:
        return
    block = tile(C)
    _quantize_rows_kernel[(triton.cdiv(R, int(block["BLOCK_R"])),)](
        x, fold, codes, scale, seed, step, row_offset, R, C, x.stride(0), x.stride(1), qmax, stream,
        FORMAT=number_format, STOCHASTIC=stochastic, FOLDED=fold is not None, **block, **OPTIONS,
    )  # fmt: skip


def builds() -> list[Build]:
    """The specialisations that are built ahead of time: rows in registers and rows in a loop, and any strides."""

    def build(
        name: str, C: int, stochastic: bool, dtype: str = "*bf16", contiguous: bool = True, number_format: int = INT8.value
    ) -> Build:  # fmt: skip
        block = tile(C)
        options = {"num_warps": block.pop("num_warps"), **OPTIONS}
        types = {"x_ptr": dtype, "codes_ptr": "*i8", "scale_ptr": "*fp32"}
        types |= dict.fromkeys(("seed_ptr", "step_ptr", "row_offset_ptr"), "*i64")
        types |= dict.fromkeys(("R", "C", "stride_xr", "stride_xc", "qmax", "stream"), "i32")
        return Build(
            name,
            _quantize_rows_kernel,
            types,
            {"FORMAT": number_format, "STOCHASTIC": stochastic, "FOLDED": False, "fold_ptr": None, **block}
            | ({"stride_xc": 1} if contiguous else {}),
            divisible_by_16=("x_ptr", "codes_ptr", "C", "stride_xr") if contiguous else (),
            options=options,
            forbidden_ptx=FORBIDDEN_PTX,
            max_registers=128 if contiguous else 254,  # 64-bit addresses element by element
        )

    return [
        build("one pass, nearest", 4096, False),
        build("one pass, stochastic", 4096, True),
        build("one pass, stochastic, 8192", 8192, True),
        build("loop, stochastic", 14336, True),
        build("short rows, nearest, fp32", 96, False, "*fp32"),
        build("loop, stochastic, any strides", 14336, True, contiguous=False),
    ]
