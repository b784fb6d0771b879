"""From a float32 element and the maximum of its row or column to the byte of its code, as the references do it, bit for bit.

- Maxima are taken over the bits of |x| as int32. For floats without sign their order is the order of the values, with
  NaN above infinity, so NaN propagates by construction, through a reduction too, and the result does not depend on the
  order of the reduction. (``tl.max`` of floats drops NaN.)
- ``enable_fp_fusion=False``: contracting x * inverse + MAGIC into one fma rounds once where the equation rounds twice.
- Rounding half to even is one addition. For |v| < 2^22, v + 1.5 * 2^23 lies in [2^23, 2^24), where the spacing of
  float32 is 1: the addition itself rounds v to an integer, half to even since 1.5 * 2^23 is even, and the low byte of
  the sum's bits is the code. The floor follows from it by a comparison. (``tl.floor`` flushes subnormals, and is a slow
  conversion; rounding v - 1/2 gives another code for v = 2^-24 - 1 where u = 0.)
- |v| <= qmax (1 + 2^-21): v of the largest element passes two roundings of relative error 2^-24 and one of 2^-22 at most
  (1/scale may be subnormal, for qmax < 4). So codes to nearest need no clamp, and others one from above, of magnitudes.
- Floats: with p = 2^floor(log2 |v|), or the smallest normal if that is larger, w = v / (p 2^-mantissa) is exact and is
  rounded like an integer, to n. The magnitude of the code is (exponent field of p) 2^mantissa + |n| - 2^mantissa: a
  subnormal has |n| < 2^mantissa in the lowest binade, and |n| = 2^(mantissa + 1) carries into the next exponent. Integer
  arithmetic all of it, which sm_80 has as well (its hardware casts know e5m2 alone), and rounds stochastically.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qtrain_kernels.counter_hash_triton import random_bits, uniform

MIN_SCALE = tl.constexpr(2.0**-100)
MAGIC = tl.constexpr(1.5 * 2**23)
MAGIC_BITS = tl.constexpr(0x4B400000)  # the bits of 1.5 * 2^23 as float32
INT8, E4M3, E5M2 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

OPTIONS = {"enable_fp_fusion": False}
# An fma rounds once where the equation rounds twice; .ftz flushes subnormals; only div.rn is IEEE.
FORBIDDEN_PTX = ("fma.", ".ftz", "div.full", ".approx")


@triton.jit
def magnitude_bits(x):
    """float32 -> the bits of |x|, whose order as int32 is that of the values, NaN the largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(amax_bits, qmax, FORMAT: tl.constexpr):
    """Magnitude bits, int32, and the largest code's value, integer -> scale. Of an infinity: infinite with integers, NaN
    with floats."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    scale = tl.math.div_rn(amax, tl.zeros_like(amax) + qmax.to(tl.float32))
    scale = tl.where(scale < MIN_SCALE, MIN_SCALE, scale)  # a NaN stays
    if FORMAT != INT8:
        scale = tl.where(scale < float("inf"), scale, float("nan"))
    return scale


@triton.jit
def inverse_of(scale):
    """1 / scale, 0 where that is not finite: there the codes are to be 0."""
    return tl.where(scale < float("inf"), tl.math.div_rn(tl.zeros_like(scale) + 1.0, scale), 0.0)


@triton.jit
def _stochastic_bits(v, column, r0, r1):
    """float32 v -> MAGIC_BITS + floor(v) + [u < v - floor(v)]."""
    shifted = v + MAGIC
    rest = v - (shifted - MAGIC)  # exact, -1/2 ... 1/2
    above = rest < 0.0
    up = uniform(random_bits(column, r0, r1)) < tl.where(above, rest + 1.0, rest)  # of v - floor(v)
    return shifted.to(tl.int32, bitcast=True) - above.to(tl.int32) + up.to(tl.int32)


@triton.jit
def _float_codes(v, column, r0, r1, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr, STOCHASTIC: tl.constexpr):  # fmt: skip
    """``LARGEST``: the largest number's code."""
    bits = v.to(tl.int32, bitcast=True)
    power = tl.maximum(bits & 0x7F800000, (128 - BIAS) << 23)
    # Exponents of float32 have the bias 127: 2^MANTISSA / power
    w = v * (((127 + MANTISSA) << 23) - (power - (127 << 23))).to(tl.float32, bitcast=True)
    below = (power >> (23 - MANTISSA)) - ((128 - BIAS) << MANTISSA)  # what the magnitude is beside |n|
    if STOCHASTIC:
        n = _stochastic_bits(w, column, r0, r1) - MAGIC_BITS
        magnitude = tl.minimum(below + tl.maximum(n, -n), LARGEST)
        return magnitude | ((n >> 31) & 0x80)  # zero has no sign
    n = (tl.abs(w) + MAGIC).to(tl.int32, bitcast=True)
    return (below + (n - MAGIC_BITS)) | ((bits >> 24) & 0x80)


@triton.jit
def codes(y, inverse, column, r0, r1, qmax, FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """y, inverse float32 -> int32 whose low byte is the code, for finite scales; meaningless where inverse is 0."""
    v = y * inverse
    if FORMAT == E4M3:
        return _float_codes(v, column, r0, r1, 3, 7, 0x7E, STOCHASTIC)
    if FORMAT == E5M2:
        return _float_codes(v, column, r0, r1, 2, 15, 0x7B, STOCHASTIC)
    if STOCHASTIC:
        return tl.minimum(_stochastic_bits(v, column, r0, r1), MAGIC_BITS + qmax)
    return (v + MAGIC).to(tl.int32, bitcast=True)
