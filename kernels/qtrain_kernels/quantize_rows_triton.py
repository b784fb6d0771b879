"""The Triton kernel of ``quantize_rows``: one program takes BLOCK_R whole rows.

Rows that fit one block stay in registers between the maximum and the codes; longer rows are read twice, the
second time mostly from L2. Three choices make the kernel bit-equal to the reference on every input:

- The maximum is taken over the bits of |x| as int32. For floats without sign their order is the order of the
  values, with NaN above infinity, so NaN propagates by construction, through the reduction too, and the result
  does not depend on the order of the reduction. (``tl.max`` of floats drops NaN.)
- ``enable_fp_fusion=False``: contracting x * inv + MAGIC into one fma rounds once where the equation rounds twice.
- Rounding half to even is one addition. For |v| < 2^22, v + 1.5 * 2^23 lies in [2^23, 2^24), where the spacing of
  float32 is 1: the addition itself rounds v to an integer, half to even since 1.5 * 2^23 is even, and the integer
  is the difference of the bits from those of 1.5 * 2^23. Here |v| <= 127 (1 + 2^-21): v of the largest element
  passes two roundings of relative error 2^-24 and one of 2^-22 at most (1/scale may be subnormal, for qmax < 4).
  The floor follows from it by a comparison. ``tl.floor`` flushes subnormals, and is a slow conversion.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtrain_kernels import quantize_rows as declaration
from qtrain_kernels.aot import Build
from qtrain_kernels.counter_hash_triton import key, random_bits, row_keys, uniform

MIN_SCALE = tl.constexpr(declaration.MIN_SCALE)
MAGIC = tl.constexpr(1.5 * 2**23)
MAGIC_BITS = tl.constexpr(0x4B400000)  # the bits of 1.5 * 2^23 as float32

# 32 elements a thread: enough independent loads in flight, and the row of one pass fits the registers.
ELEMENTS_PER_WARP = 32 * 32
ONE_PASS_COLUMNS = 8192
LOOP_COLUMNS = 4096
SHORT_TILE = 4096
OPTIONS = {"enable_fp_fusion": False}  # see the module docstring


@triton.jit
def half_even(v):
    """float32, |v| < 2^22 -> v rounded half to even, as int32 and as float32."""
    shifted = v + MAGIC
    return shifted.to(tl.int32, bitcast=True) - MAGIC_BITS, shifted - MAGIC


@triton.jit
def _magnitude_bits(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(amax, qmax):
    """float32 amax -> scale and 1 / scale."""
    scale = tl.math.div_rn(amax, tl.zeros(amax.shape, tl.float32) + qmax.to(tl.float32))
    scale = tl.where(scale < MIN_SCALE, MIN_SCALE, scale)  # a NaN stays
    return scale, tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def _codes(x, inv, column, r0, r1, qmax, STOCHASTIC: tl.constexpr):
    """x, inv float32 -> int8 codes."""
    v = x * inv
    v = tl.where(v == v, v, 0.0)
    code, rounded = half_even(v)
    if STOCHASTIC:
        above = rounded > v
        floor = tl.where(above, rounded - 1.0, rounded)
        up = uniform(random_bits(column, r0, r1)) < v - floor
        code = code - above.to(tl.int32) + up.to(tl.int32)
    code = tl.minimum(tl.maximum(code, -qmax - 1), qmax)
    return code.to(tl.int8)


@triton.jit(do_not_specialize=["qmax", "stream"])
def _quantize_rows_kernel(
    x_ptr,
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
        x = tl.load(x_row + block * stride_xc, mask=mask, other=0.0).to(tl.float32)
        magnitude = _magnitude_bits(x)
    else:
        magnitude = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
        for start in range(0, C, BLOCK_C):
            column = start + block
            mask = in_rows & (column < C)
            x = tl.load(x_row + column * stride_xc, mask=mask, other=0.0).to(tl.float32)
            magnitude = tl.maximum(magnitude, _magnitude_bits(x))
    amax = tl.max(magnitude, axis=1).to(tl.float32, bitcast=True)  # [BLOCK_R]

    scale, inv = _scale(amax, qmax)
    tl.store(scale_ptr + row_index, scale, mask=row_index < R)
    inv = tl.expand_dims(inv, 1)

    if STOCHASTIC:
        k0, k1 = key(tl.load(seed_ptr), tl.load(step_ptr), stream)
        r0, r1 = row_keys(row + tl.load(row_offset_ptr), k0, k1)
    else:
        r0, r1 = 0, 0
    if ONE_PASS:
        tl.store(codes_row + block, _codes(x, inv, block, r0, r1, qmax, STOCHASTIC), mask=mask)
    else:
        for start in range(0, C, BLOCK_C):
            column = start + block
            mask = in_rows & (column < C)
            x = tl.load(x_row + column * stride_xc, mask=mask, other=0.0).to(tl.float32)
            tl.store(codes_row + column, _codes(x, inv, column, r0, r1, qmax, STOCHASTIC), mask=mask)


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
    if R == 0:
        return codes, scale
    block = tile(C)
    _quantize_rows_kernel[(triton.cdiv(R, int(block["BLOCK_R"])),)](
        x, codes, scale, seed, step, row_offset, R, C, x.stride(0), x.stride(1), qmax, stream,
        STOCHASTIC=stochastic, **block, **OPTIONS,
    )  # fmt: skip
    return codes, scale


def builds() -> list[Build]:
    """The specialisations that are built ahead of time: rows in registers and rows in a loop, and any strides."""

    def build(name: str, C: int, stochastic: bool, dtype: str = "*bf16", contiguous: bool = True) -> Build:
        block = tile(C)
        options = {"num_warps": block.pop("num_warps"), **OPTIONS}
        types = {"x_ptr": dtype, "codes_ptr": "*i8", "scale_ptr": "*fp32"}
        types |= dict.fromkeys(("seed_ptr", "step_ptr", "row_offset_ptr"), "*i64")
        types |= dict.fromkeys(("R", "C", "stride_xr", "stride_xc", "qmax", "stream"), "i32")
        return Build(
            name,
            _quantize_rows_kernel,
            types,
            {"STOCHASTIC": stochastic, **block} | ({"stride_xc": 1} if contiguous else {}),
            divisible_by_16=("x_ptr", "codes_ptr", "C", "stride_xr") if contiguous else (),
            options=options,
            # An fma rounds once where the equation rounds twice; .ftz flushes subnormals; only div.rn is IEEE.
            forbidden_ptx=("fma.", ".ftz", "div.full", ".approx"),
            max_registers=128 if contiguous else 168,  # 64-bit addresses element by element
        )

    return [
        build("one pass, nearest", 4096, False),
        build("one pass, stochastic", 4096, True),
        build("one pass, stochastic, 8192", 8192, True),
        build("loop, stochastic", 14336, True),
        build("short rows, nearest, fp32", 96, False, "*fp32"),
        build("loop, stochastic, any strides", 14336, True, contiguous=False),
    ]
