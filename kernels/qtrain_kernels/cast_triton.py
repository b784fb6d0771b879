"""Casts inside a kernel, rounded half to even as PyTorch's are, and the special function unit without its slow corrections.

Each is one or two instructions where Triton's own form is several: a cast to bfloat16 of two elements at once, and ex2 and rcp
with results below 2^-126 flushed to 0 (their relative error is 2^-22: PTX ISA, ``ex2.approx``, ``rcp.approx``). The interpreter
knows no assembly, and rounds a cast to bfloat16 half away from zero without the carry into the exponent: there, plain forms.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 -> float32 that ``dtype`` holds exactly."""
    if dtype != tl.bfloat16:
        return x.to(dtype).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    if INTERPRETED:
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        bits = tl.where(x == x, even, bits)
    else:
        bits = tl.inline_asm_elementwise(
            "{ .reg .b32 pair; .reg .f32 low, high; mov.b32 low, $2; mov.b32 high, $3; "
            "cvt.rn.bf16x2.f32 pair, high, low; shl.b32 $0, pair, 16; and.b32 $1, pair, 0xffff0000; }",
            "=r,=r,r,r",
            [bits],
            dtype=tl.int32,
            is_pure=True,
            pack=2,
        )
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 -> ``dtype``."""
    if INTERPRETED and dtype == tl.bfloat16:
        return (rounded(x, dtype).to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def exp2(x):
    """float32 -> 2^x."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def reciprocal(x):
    """float32 -> 1 / x."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )
