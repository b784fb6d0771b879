"""The first two Triton kernels of ``quantize_rows_columns``: the maxima, and the scales and keys that follow from them.

    maxima    A program takes STEPS tiles [BLOCK_R, BLOCK_C] below each other and stores the maxima of its rows and, kept in
              registers until the end, of its columns. Atomic maxima, one a column and tile, took longer than the reading.
              On the bits of |x| (see ``rounding_triton``) a maximum does not depend on the order, and a NaN propagates.
    scales    The maxima of those maxima, scale and 1 / scale (0 where not finite), and the rows' keys of the random bits:
              what every tile of the codes would compute again.

``scratch``: as ``quantize_rows_columns_triton`` lays it out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qtrain_kernels.activation_triton import load
from qtrain_kernels.counter_hash_triton import key, row_keys
from qtrain_kernels.rounding_triton import inverse_of, magnitude_bits, scale_of

# A copy has no scale at all, one a row (column), or one for the tensor.
NONE, EACH, TENSOR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# A row of a tile of the first kernel is half a warp's, 16 bytes a lane; a program's chunk is 256 rows.
MAXIMA_TILE = {"BLOCK_R": 32, "BLOCK_C": 128, "STEPS": 8, "num_warps": 4}
SCALES_TILE = {"BLOCK": 64, "SPLIT": 16, "num_warps": 4}


@triton.jit
def within(size, start, BLOCK: tl.constexpr):
    """How many of a block's elements from ``start`` (int64) lie below ``size``, as int32."""
    return tl.minimum(size - start, BLOCK).to(tl.int32)


@triton.jit
def _magnitude(x, fold_ptr, start, index, left, mask, FOLDED: tl.constexpr):
    """Bits of |x * fold|, 0 where masked (there 0 * infinity would be NaN)."""
    if FOLDED:
        x = x * tl.load(fold_ptr + start + index, mask=index < left, other=0.0)
        return tl.where(mask, magnitude_bits(x), 0)
    return magnitude_bits(x)


@triton.jit
def _maxima_kernel(
    x_ptr,
    up_ptr,
    row_fold_ptr,
    column_fold_ptr,
    scratch_ptr,
    tensor_ptr,
    R,
    C,
    stride_xr,
    stride_xc,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS_FOLDED: tl.constexpr,
    COLUMNS_FOLDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
):
    tiles = tl.cdiv(C, BLOCK_C)
    chunk, tile = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles).to(tl.int64)
    start_c = tile * BLOCK_C
    columns = within(C, start_c, BLOCK_C)
    r, c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    row, column = tl.expand_dims(r, 1), tl.expand_dims(c, 0)
    offsets = row.to(INDEX) * stride_xr + column.to(INDEX) * stride_xc
    row_maxima_ptr = scratch_ptr + ((start_c * 0 + R) * 5 + C) + tile * R
    of_columns = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
    of_rows = tl.zeros([BLOCK_R], tl.int32)
    steps = tl.cdiv(within(R, chunk * (STEPS * BLOCK_R), STEPS * BLOCK_R), BLOCK_R)
    for step in range(0, steps):
        start_r = (chunk * STEPS + step) * BLOCK_R
        rows = within(R, start_r, BLOCK_R)
        mask = (row < rows) & (column < columns)
        x = load(x_ptr, up_ptr, start_r * stride_xr + start_c * stride_xc, offsets, mask, ACTIVATION)
        x = x.to(tl.float32)
        if COLUMNS != NONE:
            magnitude = _magnitude(x, column_fold_ptr, start_r, row, rows, mask, COLUMNS_FOLDED)
            of_columns = tl.maximum(of_columns, magnitude)
        if ROWS != NONE:
            magnitude = _magnitude(x, row_fold_ptr, start_c, column, columns, mask, ROWS_FOLDED)
            if ROWS == TENSOR:
                of_rows = tl.maximum(of_rows, tl.max(magnitude, axis=1))
            else:
                tl.store(row_maxima_ptr + start_r + r, tl.max(magnitude, axis=1), mask=r < rows)
    if ROWS == TENSOR:
        tl.atomic_max(tensor_ptr, tl.max(of_rows, axis=0), sem="relaxed")
    if COLUMNS == TENSOR:
        tl.atomic_max(tensor_ptr + 1, tl.max(tl.max(of_columns, axis=0), axis=0), sem="relaxed")
    elif COLUMNS == EACH:
        column_maxima_ptr = scratch_ptr + ((start_c * 0 + R) * 5 + C) + (start_c * 0 + tiles) * R + chunk * C
        tl.store(column_maxima_ptr + start_c + c, tl.max(of_columns, axis=0), mask=c < columns)


@triton.jit
def _scales_of(
    maxima_ptr, tensor_ptr, count, inverse_ptr, scale_ptr, index, size, qmax,
    KIND: tl.constexpr, FORMAT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Of rows or columns ``index``, whose maxima are those of ``count`` maxima each (or of the tensor)."""
    if KIND == TENSOR:
        amax = tl.load(tensor_ptr + index * 0)
    else:
        part, of = tl.expand_dims(tl.arange(0, SPLIT), 1).to(tl.int64), tl.expand_dims(index, 0)
        maxima = tl.max(of * 0 + part * 0, axis=0).to(tl.int32)
        for start in range(0, count, SPLIT):
            mask = (start + part < count) & (of < size)
            values = tl.load(maxima_ptr + (start + part) * size + of, mask=mask, other=0)
            maxima = tl.maximum(maxima, tl.max(values, axis=0))
        amax = maxima
    scale = scale_of(amax, qmax, FORMAT)
    tl.store(scale_ptr + index, scale, mask=index < size)
    tl.store(inverse_ptr + index, inverse_of(scale).to(tl.int32, bitcast=True), mask=index < size)


@triton.jit
def _store_keys(keys_ptr, seed_ptr, step_ptr, row_offset_ptr, stream, index, R):
    """The two words of ``row_keys`` of each row, [2, R]."""
    k0, k1 = key(tl.load(seed_ptr), tl.load(step_ptr), stream)
    r0, r1 = row_keys(index + tl.load(row_offset_ptr), k0, k1)
    tl.store(keys_ptr + index, r0.to(tl.int32, bitcast=True), mask=index < R)
    tl.store(keys_ptr + R + index, r1.to(tl.int32, bitcast=True), mask=index < R)


@triton.jit(do_not_specialize=["row_qmax", "column_qmax", "row_stream", "column_stream"])
def _gather_kernel(
    scratch_ptr,
    tensor_ptr,
    row_scale_ptr,
    column_scale_ptr,
    seed_ptr,
    step_ptr,
    row_offset_ptr,
    R,
    C,
    row_qmax,
    column_qmax,
    row_stream,
    column_stream,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_FORMAT: tl.constexpr,
    COLUMN_FORMAT: tl.constexpr,
    ROWS_STOCHASTIC: tl.constexpr,
    COLUMNS_STOCHASTIC: tl.constexpr,
    CHUNK_R: tl.constexpr,
    CHUNK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = start + tl.arange(0, BLOCK)
    tiles, chunks = tl.cdiv(C, CHUNK_C), tl.cdiv(R, CHUNK_R)
    maxima_ptr = scratch_ptr + ((start * 0 + R) * 5 + C)
    keys_ptr = scratch_ptr + (start * 0 + R + C)
    if ROWS != NONE:
        _scales_of(maxima_ptr, tensor_ptr, tiles, scratch_ptr, row_scale_ptr, index, R, row_qmax, ROWS, ROW_FORMAT, SPLIT)  # fmt: skip
    if COLUMNS != NONE:
        maxima_ptr += (start * 0 + tiles) * R
        _scales_of(maxima_ptr, tensor_ptr + 1 if COLUMNS == TENSOR else None, chunks, scratch_ptr + R, column_scale_ptr, index, C, column_qmax, COLUMNS, COLUMN_FORMAT, SPLIT)  # fmt: skip
    if ROWS_STOCHASTIC:
        _store_keys(keys_ptr, seed_ptr, step_ptr, row_offset_ptr, row_stream, index, R)
    if COLUMNS_STOCHASTIC:
        _store_keys(keys_ptr + (start * 0 + R) * 2, seed_ptr, step_ptr, row_offset_ptr, column_stream, index, R)  # fmt: skip
