"""The Triton kernel of ``quantize_rows``: one program takes BLOCK_R whole rows.

Rows that fit one block stay in registers between the maximum and the codes; longer rows are read twice, the
second time mostly from L2. Three choices make the kernel bit-equal to the reference on every input:

- The maximum is taken over the bits of |x| as int32. For floats without sign their order is the order of the
  values, with NaN above infinity, so NaN propagates by construction, through the reduction too, and the result
  does not depend on the order of the reduction. (``tl.max`` of floats drops NaN.)
- ``enable_fp_fusion=False``: contracting x * inv + MAGIC into one fma rounds once where the equation rounds twice.
- Rounding half to even is one addition. For |v| < 2^22, v + 1.5 * 2^23 lies in [2^23, 2^24), where the spacing of
  float32 is 1: the addition itself rounds v to an integer, half to even since 1.5 * 2^23 is even, and the low byte of
  the sum's bits is the code. Here |v| <= 127 (1 + 2^-21): v of the largest element passes two roundings of relative
  error 2^-24 and one of 2^-22 at most (1/scale may be subnormal, for qmax < 4). So codes to nearest need no clamp.
  The floor follows from it by a comparison. ``tl.floor`` flushes subnormals, and is a slow conversion; rounding
  v - 1/2 gives another code for v = 2^-24 - 1 where u = 0.
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
def magnitude_bits(x):
    """float32 -> the bits of |x|, whose order as int32 is that of the values, NaN the largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_and_inverse(amax_bits, qmax):
    """Magnitude bits, int32 -> scale, 1 / scale, and int32 of ones where the scale is finite, of zeros elsewhere."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    scale = tl.math.div_rn(amax, tl.zeros_like(amax) + qmax.to(tl.float32))
    scale = tl.where(scale < MIN_SCALE, MIN_SCALE, scale)  # a NaN stays
    return scale, tl.math.div_rn(tl.zeros_like(amax) + 1.0, scale), -(scale < float("inf")).to(tl.int32)


@triton.jit
def codes(y, inverse, finite, column, r0, r1, qmax, STOCHASTIC: tl.constexpr):
    """y, inverse float32, finite of ``scale_and_inverse`` -> int32 whose low byte is the int8 code."""
    v = y * inverse
    if STOCHASTIC:
        shifted = v + MAGIC
        rest = v - (shifted - MAGIC)  # exact, -1/2 ... 1/2
        above = rest < 0.0
        up = uniform(random_bits(column, r0, r1)) < tl.where(above, rest + 1.0, rest)  # of v - floor
        code = shifted.to(tl.int32, bitcast=True) - above.to(tl.int32) + up.to(tl.int32)
        code = tl.minimum(code, MAGIC_BITS + qmax)
    else:
        code = (v + MAGIC).to(tl.int32, bitcast=True)
    return code & finite


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
    scale, inverse, finite = scale_and_inverse(tl.max(magnitude, axis=1), qmax)  # [BLOCK_R]
    tl.store(scale_ptr + row_index, scale, mask=row_index < R)
    inverse, finite = tl.expand_dims(inverse, 1), tl.expand_dims(finite, 1)

    if STOCHASTIC:
        k0, k1 = key(tl.load(seed_ptr), tl.load(step_ptr), stream)
        r0, r1 = row_keys(row + tl.load(row_offset_ptr), k0, k1)
    else:
        r0, r1 = 0, 0
    if ONE_PASS:
        code = codes(x, inverse, finite, block, r0, r1, qmax, STOCHASTIC)
        tl.store(codes_row + block, code.to(tl.int8), mask=mask)
    else:
        for start in range(0, C, BLOCK_C):
            column = start + block
            mask = in_rows & (column < C)
            x = _load(x_row, fold_ptr, column, stride_xc, mask, C, FOLDED)
            code = codes(x, inverse, finite, column, r0, r1, qmax, STOCHASTIC)
            tl.store(codes_row + column, code.to(tl.int8), mask=mask)


def tile(C: int) -> dict[str, int | bool]:
    """The block sizes and warps for rows of ``C`` columns."""
    one_pass = C <= ONE_PASS_COLUMNS
    BLOCK_C = max(16, triton.next_power_of_2(C)) if one_pass else LOOP_COLUMNS
    BLOCK_R = max(1, SHORT_TILE // BLOCK_C)
    num_warps = BLOCK_R * BLOCK_C // ELEMENTS_PER_WARP
    return {"ONE_PASS": one_pass, "BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C, "num_warps": num_warps}


def launch(
    x: Tensor, qmax: int, stochastic: bool, seed: Tensor, step: Tensor, stream: int, row_offset: Tensor
) -> tuple[Tensor, Tensor]:
    """``quantize_rows.reference`` by one kernel; the scalars are read on the device, nothing synchronizes."""
    declaration.check(x, qmax, stochastic, seed, step, stream, row_offset)
    return folded(x, None, qmax, stochastic, seed, step, stream, row_offset)


def folded(
    x: Tensor, fold: Tensor | None, qmax: int, stochastic: bool, seed: Tensor, step: Tensor, stream: int, row_offset: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same of x * fold; ``fold`` [C] float32, contiguous, or None. The arguments are not checked."""
    R, C = x.shape
    codes = torch.empty((R, C), dtype=torch.int8, device=x.device)
    scale = torch.empty((R,), dtype=torch.float32, device=x.device)
    if R == 0:
        return codes, scale
    block = tile(C)
    _quantize_rows_kernel[(triton.cdiv(R, int(block["BLOCK_R"])),)](
        x, fold, codes, scale, seed, step, row_offset, R, C, x.stride(0), x.stride(1), qmax, stream,
        STOCHASTIC=stochastic, FOLDED=fold is not None, **block, **OPTIONS,
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
            {"STOCHASTIC": stochastic, "FOLDED": False, "fold_ptr": None, **block}
            | ({"stride_xc": 1} if contiguous else {}),
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
