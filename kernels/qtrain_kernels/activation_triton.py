"""The activations of ``activation_quantize``, applied to what a kernel loads.

f is computed in float32, in about 15 instructions: more would weigh against the memory (a GPU of 4 TB/s has some 20
instructions for an element of 3 bytes). silu and gelu_tanh are h * sigmoid, since (1 + tanh z) / 2 = sigmoid(2 z). Where
1 + exp passes 2^126 the sigmoid is flushed to 0: there |y| < 2^-100, whose code is 0 too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qtrain_kernels.cast_triton import exp2, reciprocal, rounded


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    """float32 -> float32; NaN stays NaN."""
    if ACTIVATION == "gelu":
        # h Phi(h) = max(h, 0) - |h| Phi(-|h|), and Phi(-|h|) = erfc(|h| / sqrt 2) / 2 = t p(t) exp(-h^2 / 2) with
        # t = 1 / (1 + 0.3275911 |h| / sqrt 2): Abramowitz and Stegun 7.1.26, |error| <= 0.75e-7; halved coefficients
        size = tl.abs(h)
        t = reciprocal(tl.fma(size, 0.23164189, 1.0))
        p = tl.fma(t, 0.5307027145, -0.7265760135)
        p = tl.fma(t, p, 0.7107068705)
        p = tl.fma(t, p, -0.142248368)
        p = tl.fma(t, p, 0.127414796)
        tail = t * p * exp2(h * h * -0.7213475204444817)  # log2(e) / 2
        y = tl.where(h < float("inf"), tl.where(h < 0.0, 0.0, h) - size * tail, h)
    elif ACTIVATION == "gelu_tanh":
        # -2 log2(e) sqrt(2 / pi) (h + 0.044715 h^3)
        e = exp2(h * tl.fma(h * h, -0.10294324, -2.302208198))
        y = h * reciprocal(1.0 + e)
    elif ACTIVATION == "silu":
        y = h * reciprocal(1.0 + exp2(h * -1.4426950408889634))  # log2(e)
    else:
        y = tl.where(h < 0.0, 0.0, h)
        if ACTIVATION == "relu2":
            y = y * y
    return y


@triton.jit
def load(h_ptr, up_ptr, start, offsets, mask, ACTIVATION: tl.constexpr):
    """h as it lies where ACTIVATION is "", else y = f(h), or f(h) * up where up_ptr is not None: float32, rounded as eager
    PyTorch rounds it. ``start``: of the tile, ``offsets`` within it, of both; 0 where masked."""
    y = tl.load(h_ptr + start + offsets, mask=mask, other=0.0)
    if ACTIVATION != "":
        dtype: tl.constexpr = y.dtype
        y = rounded(activate(y.to(tl.float32), ACTIVATION), dtype)
        if up_ptr is not None:
            y = rounded(y * tl.load(up_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32), dtype)
    return y
