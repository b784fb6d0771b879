"""The Triton kernels of ``quantize_rows_columns``: the maxima in one read, the codes of both copies in a second.

Codes along rows wait for the maxima of whole rows and codes along columns for those of whole columns, so that x, unless it
fits L2, is read twice: 2 + 2 bytes an element of bfloat16, and 1 + 1 written. Rows alone wait for nothing else: then the
one-read kernel of ``quantize_rows`` runs.

    maxima    A program takes STEPS tiles [BLOCK_R, BLOCK_C] below each other and stores the maxima of its rows and, kept in
              registers until the end, of its columns. Atomic maxima, one a column and tile, took longer than the reading.
              On the bits of |x| (see ``rounding_triton``) a maximum does not depend on the order, and a NaN propagates.
    scales    The maxima of those maxima, scale and 1 / scale (0 where not finite), and the rows' keys of the random bits:
              what every tile would compute again.
    codes     Tiles from last to first: what the first kernel read last is still in L2. A tile is read as four that
              interleave, rows 4 g + k for k = 0 ... 3, so that a thread owns four neighbours of a column and packs their
              codes into one word; [BLOCK_R / 4, BLOCK_C] words are then transposed, through shared memory, where bytes
              would take four times the accesses. Both stores are coalesced.

Between them lies one ``scratch`` of int32, so that a launch has few arguments and one allocation:

    1 / scale of rows [R] | of columns [C] | keys r0, r1 of the rows' codes [2, R] | of the columns' [2, R]
    | maxima of rows [tiles across, R] | of columns [chunks down, C]

``quantize_fp8_rows_columns`` runs the same kernels with other codes, ``activation_quantize`` on f(x) in the place of x.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtrain_kernels import quantize_rows_columns as declaration
from qtrain_kernels import quantize_rows_triton
from qtrain_kernels.activation_triton import load
from qtrain_kernels.aot import Build
from qtrain_kernels.counter_hash_triton import key, row_keys
from qtrain_kernels.rounding_triton import (
    FORBIDDEN_PTX,
    INT8,
    MIN_SCALE,
    OPTIONS,
    codes,
    inverse_of,
    magnitude_bits,
    scale_of,
)

# A copy has no scale at all, one a row (column), or one for the tensor.
NONE, EACH, TENSOR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# A row of a tile of the first kernel is half a warp's, 16 bytes a lane; a program's chunk is 256 rows.
MAXIMA_TILE = {"BLOCK_R": 32, "BLOCK_C": 128, "STEPS": 8, "num_warps": 4}
SCALES_TILE = {"BLOCK": 64, "SPLIT": 16, "num_warps": 4}
CODES_TILE = {"BLOCK_R": 64, "BLOCK_C": 64, "num_warps": 4}


@triton.jit
def _within(size, start, BLOCK: tl.constexpr):
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
    columns = _within(C, start_c, BLOCK_C)
    r, c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    row, column = tl.expand_dims(r, 1), tl.expand_dims(c, 0)
    offsets = row.to(INDEX) * stride_xr + column.to(INDEX) * stride_xc
    row_maxima_ptr = scratch_ptr + ((start_c * 0 + R) * 5 + C) + tile * R
    of_columns = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
    of_rows = tl.zeros([BLOCK_R], tl.int32)
    steps = tl.cdiv(_within(R, chunk * (STEPS * BLOCK_R), STEPS * BLOCK_R), BLOCK_R)
    for step in range(0, steps):
        start_r = (chunk * STEPS + step) * BLOCK_R
        rows = _within(R, start_r, BLOCK_R)
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
    rows, columns = _within(R, start_r, BLOCK_R), _within(C, start_c, BLOCK_C)
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


class Side(NamedTuple):
    """One copy. ``qmax``: the largest code's value, 0 for no copy. ``number_format``: INT8, E4M3, E5M2 of ``rounding_triton``.
    ``fold``: [C] for rows, [R] for columns, float32, or None."""

    qmax: int
    number_format: int
    stochastic: bool
    per_tensor: bool
    stream: int
    fold: Tensor | None

    @property
    def kind(self) -> int:
        return NONE.value if not self.qmax else TENSOR.value if self.per_tensor else EACH.value


Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def launch(
    x: Tensor,
    row_qmax: int, row_stochastic: bool, row_per_tensor: bool, row_stream: int, row_fold: Tensor | None,
    column_qmax: int, column_stochastic: bool, column_per_tensor: bool, column_stream: int, column_fold: Tensor | None,
    seed: Tensor, step: Tensor, row_offset: Tensor,
    maxima_tile: dict[str, int] = MAXIMA_TILE, codes_tile: dict[str, int] = CODES_TILE,
) -> Outputs:  # fmt: skip
    """As ``reference``, on the device of x; nothing synchronizes. The tiles change the speed alone."""
    arguments = (
        x, row_qmax, row_stochastic, row_per_tensor, row_stream, row_fold,
        column_qmax, column_stochastic, column_per_tensor, column_stream, column_fold, seed, step, row_offset,
    )  # fmt: skip
    outputs = declaration._fake(*arguments)  # checks them, too
    rows = Side(row_qmax, INT8.value, row_stochastic, row_per_tensor, row_stream, row_fold)
    columns = Side(column_qmax, INT8.value, column_stochastic, column_per_tensor, column_stream, column_fold)
    quantize(x, rows, columns, (seed, step, row_offset), outputs, maxima_tile, codes_tile)
    return outputs


def quantize(
    x: Tensor, rows: Side, columns: Side, counters: tuple[Tensor, Tensor, Tensor], outputs: Outputs,
    maxima_tile: dict[str, int] = MAXIMA_TILE, codes_tile: dict[str, int] = CODES_TILE,
    activation: str = "", up: Tensor | None = None,
) -> None:  # fmt: skip
    """Write both copies into ``outputs``, whose codes are of any dtype of one byte. The arguments are not checked.

    activation: of f, where f(x), or f(x) * up, is quantized in the place of x, rows alone excepted; up has x's strides."""
    row_codes, row_scale, column_codes, column_scale = (
        t.view(torch.int8) if t.element_size() == 1 else t for t in outputs
    )
    R, C = x.shape
    row_fold, column_fold = (None if f is None else f.contiguous() for f in (rows.fold, columns.fold))
    if not R or not C:
        row_scale.fill_(MIN_SCALE.value)
        column_scale.fill_(MIN_SCALE.value)
        return
    if not columns.kind and rows.kind != TENSOR.value:
        if rows.kind:
            assert not activation
            quantize_rows_triton.quantize(
                x, row_fold, row_codes, row_scale, rows.qmax, rows.number_format, rows.stochastic,
                *counters[:2], rows.stream, counters[2],
            )  # fmt: skip
        return
    sides = {"ROWS": rows.kind, "COLUMNS": columns.kind}
    codes = {"ROW_FORMAT": rows.number_format, "COLUMN_FORMAT": columns.number_format}
    codes |= {"ROWS_STOCHASTIC": rows.stochastic, "COLUMNS_STOCHASTIC": columns.stochastic}
    read = {
        "ROWS_FOLDED": row_fold is not None,
        "COLUMNS_FOLDED": column_fold is not None,
        "ACTIVATION": activation,
    }
    chunk_r, chunk_c = maxima_tile["BLOCK_R"] * maxima_tile["STEPS"], maxima_tile["BLOCK_C"]
    chunks, tiles = triton.cdiv(R, chunk_r), triton.cdiv(C, chunk_c)
    scratch = torch.empty(5 * R + C + tiles * R + chunks * C, dtype=torch.int32, device=x.device)
    per_tensor = TENSOR.value in sides.values()
    tensor_amax = torch.zeros(2, dtype=torch.int32, device=x.device) if per_tensor else None
    shape = (R, C, x.stride(0), x.stride(1))
    _maxima_kernel[(chunks * tiles,)](
        x, up, row_fold, column_fold, scratch, tensor_amax, *shape,
        **sides, **read, INDEX=_index(x, maxima_tile), **maxima_tile, **OPTIONS,
    )  # fmt: skip
    _gather_kernel[(triton.cdiv(max(R, C), SCALES_TILE["BLOCK"]),)](
        scratch, tensor_amax, row_scale, column_scale, *counters, R, C, rows.qmax, columns.qmax, rows.stream, columns.stream,
        **sides, **codes, CHUNK_R=chunk_r, CHUNK_C=chunk_c, **SCALES_TILE, **OPTIONS,
    )  # fmt: skip
    words = bool(columns.kind) and R % 4 == 0
    BLOCK_R, BLOCK_C = codes_tile["BLOCK_R"], codes_tile["BLOCK_C"]
    _codes_kernel[(triton.cdiv(R, BLOCK_R) * triton.cdiv(C, BLOCK_C),)](
        x, up, row_fold, column_fold, scratch, row_codes, column_codes.view(torch.int32) if words else column_codes,
        *shape, R // 4 if words else R, rows.qmax, columns.qmax, WORDS=words,
        WHOLE=R % BLOCK_R == 0 and C % BLOCK_C == 0, **sides, **codes, **read, INDEX=_index(x, codes_tile), **codes_tile,
        **OPTIONS,
    )  # fmt: skip


def _index(x: Tensor, tile: dict[str, int]) -> Any:
    """The integers that offsets within a tile fit, in x and in both copies."""
    extent = max(
        tile["BLOCK_R"] * abs(x.stride(0)) + tile["BLOCK_C"] * abs(x.stride(1)),
        (tile["BLOCK_R"] + 1) * x.shape[1],
        (tile["BLOCK_C"] + 1) * x.shape[0],
    )
    return tl.int32 if extent < 2**31 else tl.int64


def build(
    name: str, kernel: Any, tile: dict[str, int], contiguous: bool = True, folded: bool = False, gated: bool = False,
    **constants: Any,
) -> Build:  # fmt: skip
    """A specialisation: bfloat16 x, both copies nearest to int8 unless ``constants`` say otherwise."""
    types = {
        "x_ptr": "*bf16",
        "up_ptr": "*bf16",
        "row_codes_ptr": "*i8",
        "column_codes_ptr": "*i32" if contiguous else "*i8",
    }
    for pointer in ("fold", "scale"):
        types |= {f"row_{pointer}_ptr": "*fp32", f"column_{pointer}_ptr": "*fp32"}
    types["scratch_ptr"] = "*i32"
    types |= dict.fromkeys(("seed_ptr", "step_ptr", "row_offset_ptr"), "*i64")
    sizes = ("R", "C", "stride_xr", "stride_xc", "column_stride")
    types |= dict.fromkeys((*sizes, "row_qmax", "column_qmax", "row_stream", "column_stream"), "i32")
    aligned = (
        "x_ptr",
        *(("up_ptr",) if gated else ()),
        "row_codes_ptr",
        "column_codes_ptr",
        "R",
        "C",
        "stride_xr",
        "column_stride",
    )
    both = {"ROWS": 1, "COLUMNS": 1, "ROW_FORMAT": INT8.value, "COLUMN_FORMAT": INT8.value}
    both |= {"ROWS_STOCHASTIC": False, "COLUMNS_STOCHASTIC": False}
    both |= {"ROWS_FOLDED": folded, "COLUMNS_FOLDED": folded, "WORDS": contiguous, "WHOLE": contiguous}
    both |= {"ACTIVATION": ""} | ({} if gated else {"up_ptr": None})
    constants = {**both, "INDEX": tl.int32 if contiguous else tl.int64, **tile, **constants}
    constants |= {"tensor_ptr": None, "CHUNK_R": 256, "CHUNK_C": 256}
    constants |= {} if folded else {"row_fold_ptr": None, "column_fold_ptr": None}
    constants |= {"stride_xc": 1} if contiguous else {}
    return Build(
        name,
        kernel,
        types,
        {n: v for n, v in constants.items() if n in kernel.arg_names},
        divisible_by_16=tuple(n for n in aligned if contiguous and n in kernel.arg_names),
        options={"num_warps": tile["num_warps"], **OPTIONS},
        forbidden_ptx=FORBIDDEN_PTX,
        max_registers=128 if contiguous else 254,  # 64-bit addresses element by element
    )


def activation_builds(activation: str, gated: bool, **constants: Any) -> list[Build]:
    """The two kernels that read, with f(x) or f(x) * up in the place of x. f may use fma and fast division."""
    form = f"{activation}{', gated' if gated else ''}"
    form += ", stochastic" if constants.get("ROWS_STOCHASTIC") else ""
    return [
        replace(
            build(f"{name}, {form}", kernel, tile, gated=gated, ACTIVATION=activation, **constants),
            forbidden_ptx=(),
        )
        for name, kernel, tile in (
            ("maxima", _maxima_kernel, MAXIMA_TILE),
            ("codes", _codes_kernel, CODES_TILE),
        )
    ]


def builds() -> list[Build]:
    """The kernels as training launches them, and with any strides."""
    stochastic = {"ROWS_STOCHASTIC": True, "COLUMNS_STOCHASTIC": True}
    return [
        build("maxima", _maxima_kernel, MAXIMA_TILE),
        build("maxima, folds, any strides", _maxima_kernel, MAXIMA_TILE, contiguous=False, folded=True),
        build("scales", _gather_kernel, SCALES_TILE, **stochastic),
        build("codes, nearest", _codes_kernel, CODES_TILE),
        build("codes, stochastic, folds", _codes_kernel, CODES_TILE, folded=True, **stochastic),
        build("codes, columns", _codes_kernel, CODES_TILE, ROWS=0),
        build("codes, any strides", _codes_kernel, CODES_TILE, contiguous=False, **stochastic),
    ]
