"""Rounding float32 to a narrower dtype inside a kernel, half to even, as PyTorch's casts do."""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's interpreter rounds a cast to bfloat16 half away from zero and drops the carry into the exponent.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 -> float32 that ``dtype`` holds exactly: one conversion each way, or its bits where interpreted."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype).to(tl.float32)
