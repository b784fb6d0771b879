"""The last Triton kernel of ``quantize_rows_columns``: the codes of both copies, from one read of x.

Tiles from last to first: what the kernel of the maxima read last is still in L2. A tile is read as four that interleave, rows
4 g + k for k = 0 ... 3, so that a thread owns four neighbours of a column and packs their codes into one word; [BLOCK_R / 4,
BLOCK_C] words are then transposed, through shared memory, where bytes would take four times the accesses. Both stores are
coalesced.

``scratch``: as ``quantize_rows_columns_triton`` lays it out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qtrain_kernels.activation_triton import load
from qtrain_kernels.rounding_triton import codes
from qtrain_kernels.rows_columns_maxima_triton import NONE, within

CODES_TILE = {"BLOCK_R": 64, "BLOCK_C": 64, "num_warps": 4}


@triton.jit
def _row_words(scratch_ptr, row, in_rows):
    return tl.load(scratch_ptr + row, mask=in_rows, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _quantize_tile(
    x, row, column, start_c, in_rows, in_columns, scratch_ptr, inverse, row_fold_ptr, column_fold_ptr, row_codes_ptr,
    R, C, row_qmax, column_qmax,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW_FORMAT: tl.constexpr, COLUMN_FORMAT: tl.constexpr,
    ROWS_STOCHASTIC: tl.constexpr, COLUMNS_STOCHASTIC: tl.constexpr,
    ROWS_FOLDED: tl.constexpr, COLUMNS_FOLDED: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """One of the four tiles [G, BLOCK_C]: stores its codes along rows and returns those along columns, int32 in 0 ... 255;
    ``inverse`` [1, BLOCK_C] is the columns'. The pointers begin at the tile's first row or column."""
    x = x.to(tl.float32)
    name_c = start_c + column
    keys_ptr = scratch_ptr + (start_c * 0 + R + C)
    r0, r1 = 0, 0
    if ROWS != NONE:
        row_inverse = _row_words(scratch_ptr, row, in_rows).to(tl.float32, bitcast=True)
        y = x
        if ROWS_FOLDED:
            y = x * tl.load(row_fold_ptr + column, mask=in_columns, other=0.0)
        if ROWS_STOCHASTIC:
            r0, r1 = _row_words(keys_ptr, row, in_rows), _row_words(keys_ptr + R, row, in_rows)
        code = codes(y, row_inverse, name_c, r0, r1, row_qmax, ROW_FORMAT, ROWS_STOCHASTIC)
        code = tl.where(row_inverse > 0.0, code, 0).to(tl.int8)
        tl.store(row_codes_ptr + (row.to(INDEX) * C + column), code, mask=in_rows & in_columns)
    if COLUMNS == NONE:
        return tl.zeros_like(x).to(tl.int32)
    if COLUMNS_FOLDED:
        x = x * tl.load(column_fold_ptr + row, mask=in_rows, other=0.0)
    if COLUMNS_STOCHASTIC:
        keys_ptr += (start_c * 0 + R) * 2
        r0, r1 = _row_words(keys_ptr, row, in_rows), _row_words(keys_ptr + R, row, in_rows)
    return codes(x, inverse, name_c, r0, r1, column_qmax, COLUMN_FORMAT, COLUMNS_STOCHASTIC) & 0xFF


@triton.jit(do_not_specialize=["row_qmax", "column_qmax"])
def _codes_kernel(
    x_ptr,
    up_ptr,
    row_fold_ptr,
    column_fold_ptr,
    scratch_ptr,
    row_codes_ptr,
    column_codes_ptr,
    R,
    C,
    stride_xr,
    stride_xc,
    column_stride,
    row_qmax,
    column_qmax,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_FORMAT: tl.constexpr,
    COLUMN_FORMAT: tl.constexpr,
    ROWS_STOCHASTIC: tl.constexpr,
    COLUMNS_STOCHASTIC: tl.constexpr,
    ROWS_FOLDED: tl.constexpr,
    COLUMNS_FOLDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WORDS: tl.constexpr,
    WHOLE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    G: tl.constexpr = BLOCK_R // 4
    tiles = tl.cdiv(C, BLOCK_C)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    start_r = (program // tiles).to(tl.int64) * BLOCK_R
    start_c = (program % tiles).to(tl.int64) * BLOCK_C
    rows, columns = within(R, start_r, BLOCK_R), within(C, start_c, BLOCK_C)
    row0 = tl.expand_dims(4 * tl.arange(0, G), 1)
    row1, row2, row3 = row0 + 1, row0 + 2, row0 + 3
    column = tl.expand_dims(tl.arange(0, BLOCK_C), 0)
    if WHOLE:  # constants, with which the masks vanish
        in_columns, in0 = tl.full([1, BLOCK_C], True, tl.int1), tl.full([G, 1], True, tl.int1)
        in1, in2, in3 = in0, in0, in0
    else:
        in_columns, in0, in1, in2, in3 = column < columns, row0 < rows, row1 < rows, row2 < rows, row3 < rows
    tile = start_r * stride_xr + start_c * stride_xc
    x_column = column.to(INDEX) * stride_xc
    # All four before the first store, which they could not pass
    x0 = load(x_ptr, up_ptr, tile, row0.to(INDEX) * stride_xr + x_column, in0 & in_columns, ACTIVATION)
    x1 = load(x_ptr, up_ptr, tile, row1.to(INDEX) * stride_xr + x_column, in1 & in_columns, ACTIVATION)
    x2 = load(x_ptr, up_ptr, tile, row2.to(INDEX) * stride_xr + x_column, in2 & in_columns, ACTIVATION)
    x3 = load(x_ptr, up_ptr, tile, row3.to(INDEX) * stride_xr + x_column, in3 & in_columns, ACTIVATION)
    row_codes_ptr += start_r * C + start_c
    if ROWS_FOLDED:
        row_fold_ptr += start_c
    if COLUMNS_FOLDED:
        column_fold_ptr += start_r
    inverse = tl.full([1, BLOCK_C], 0.0, tl.float32)
    if COLUMNS != NONE:
        inverse = tl.load(scratch_ptr + R + start_c + column, mask=in_columns, other=0)
        inverse = inverse.to(tl.float32, bitcast=True)
    scratch_ptr += start_r
    word = _quantize_tile(
        x0, row0, column, start_c, in0, in_columns, scratch_ptr, inverse, row_fold_ptr, column_fold_ptr,
        row_codes_ptr, R, C, row_qmax, column_qmax,
        ROWS, COLUMNS, ROW_FORMAT, COLUMN_FORMAT, ROWS_STOCHASTIC, COLUMNS_STOCHASTIC, ROWS_FOLDED, COLUMNS_FOLDED, INDEX,
    )  # fmt: skip
    byte1 = _quantize_tile(
        x1, row1, column, start_c, in1, in_columns, scratch_ptr, inverse, row_fold_ptr, column_fold_ptr,
        row_codes_ptr, R, C, row_qmax, column_qmax,
        ROWS, COLUMNS, ROW_FORMAT, COLUMN_FORMAT, ROWS_STOCHASTIC, COLUMNS_STOCHASTIC, ROWS_FOLDED, COLUMNS_FOLDED, INDEX,
    )  # fmt: skip
    byte2 = _quantize_tile(
        x2, row2, column, start_c, in2, in_columns, scratch_ptr, inverse, row_fold_ptr, column_fold_ptr,
        row_codes_ptr, R, C, row_qmax, column_qmax,
        ROWS, COLUMNS, ROW_FORMAT, COLUMN_FORMAT, ROWS_STOCHASTIC, COLUMNS_STOCHASTIC, ROWS_FOLDED, COLUMNS_FOLDED, INDEX,
    )  # fmt: skip
    byte3 = _quantize_tile(
        x3, row3, column, start_c, in3, in_columns, scratch_ptr, inverse, row_fold_ptr, column_fold_ptr,
        row_codes_ptr, R, C, row_qmax, column_qmax,
        ROWS, COLUMNS, ROW_FORMAT, COLUMN_FORMAT, ROWS_STOCHASTIC, COLUMNS_STOCHASTIC, ROWS_FOLDED, COLUMNS_FOLDED, INDEX,
    )  # fmt: skip
    if COLUMNS != NONE:
        word |= (byte1 << 8) | (byte2 << 16) | (byte3 << 24)
        word = tl.trans(tl.where(inverse > 0.0, word, 0))  # [BLOCK_C, G]
        c = tl.expand_dims(tl.arange(0, BLOCK_C), 1)
        g = tl.expand_dims(tl.arange(0, G), 0)
        if WORDS:
            codes_ptr = column_codes_ptr + start_c * column_stride + start_r // 4
            mask = tl.full([BLOCK_C, G], True, tl.int1) if WHOLE else (c < columns) & (4 * g < rows)
            tl.store(codes_ptr + (c.to(INDEX) * column_stride + g), word, mask=mask)
        else:
            codes_ptr = column_codes_ptr + start_c * column_stride + start_r
            for k in tl.static_range(4):
                mask = (c < columns) & (4 * g + k < rows)
                byte = (word >> (8 * k)).to(tl.int8)
                tl.store(codes_ptr + (c.to(INDEX) * column_stride + (4 * g + k)), byte, mask=mask)
