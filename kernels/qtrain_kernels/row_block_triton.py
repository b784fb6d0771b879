"""What kernels that quantize whole rows share: one program takes BLOCK_R of them.

Rows that fit one block stay in registers between the maximum and the codes; longer ones are read, and what is quantized is
computed, once more for the codes. A kernel of this kind says what that is, and calls, in this order, ``rows_of_program``,
``store_scales`` of the maxima of its magnitudes, ``keys_of_rows`` and ``store_codes``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qtrain_kernels.counter_hash_triton import key, row_keys
from qtrain_kernels.rounding_triton import codes, inverse_of, scale_of

# 32 elements a thread: enough independent loads in flight, and the row of one pass fits the registers.
ELEMENTS_PER_WARP = 32 * 32
LOOP_COLUMNS = 4096
SHORT_TILE = 4096


def tile(C: int, one_pass_columns: int) -> dict[str, int | bool]:
    """The block sizes and warps for rows of ``C`` columns, which stay in registers up to ``one_pass_columns``."""
    one_pass = one_pass_columns >= C
    BLOCK_C = max(16, triton.next_power_of_2(C)) if one_pass else LOOP_COLUMNS
    BLOCK_R = max(1, SHORT_TILE // BLOCK_C)
    num_warps = BLOCK_R * BLOCK_C // ELEMENTS_PER_WARP
    return {"ONE_PASS": one_pass, "BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C, "num_warps": num_warps}


@triton.jit
def rows_of_program(R, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """-> rows [BLOCK_R] int64, the same [BLOCK_R, 1], whether they exist, and the block's columns [1, BLOCK_C] int64."""
    row_index = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = tl.expand_dims(row_index, 1)
    return row_index, row, row < R, tl.expand_dims(tl.arange(0, BLOCK_C), 0).to(tl.int64)


@triton.jit
def store_scales(scale_ptr, magnitude, row_index, R, qmax, FORMAT: tl.constexpr):
    """Of the magnitude bits [BLOCK_R, BLOCK_C] -> 1 / scale [BLOCK_R, 1], 0 where the codes are to be 0."""
    scale = scale_of(tl.max(magnitude, axis=1), qmax, FORMAT)
    tl.store(scale_ptr + row_index, scale, mask=row_index < R)
    return tl.expand_dims(inverse_of(scale), 1)


@triton.jit
def keys_of_rows(seed_ptr, step_ptr, row_offset_ptr, stream, row, STOCHASTIC: tl.constexpr):
    """The two words of ``row_keys`` of each row, which may stand for nothing where rounding is to nearest."""
    r0, r1 = 0, 0
    if STOCHASTIC:
        k0, k1 = key(tl.load(seed_ptr), tl.load(step_ptr), stream)
        r0, r1 = row_keys(row + tl.load(row_offset_ptr), k0, k1)
    return r0, r1


@triton.jit
def store_codes(codes_ptr, y, inverse, column, r0, r1, qmax, mask, FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr):  # fmt: skip
    """The codes of y [BLOCK_R, BLOCK_C], whose columns are ``column``."""
    code = tl.where(inverse > 0.0, codes(y, inverse, column, r0, r1, qmax, FORMAT, STOCHASTIC), 0)
    tl.store(codes_ptr, code.to(tl.int8), mask=mask)
