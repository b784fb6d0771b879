"""Ranges: from the elements of a block to its scale and zero point.

    symmetric    x ~ codes * scale                     scale = amax / format.max
    asymmetric   x ~ (codes - zero_point) * scale      scale = (hi - lo) / (2^b - 1), lo <= 0 <= hi

A clip chooses amax (or lo, hi) within the block; a scale format rounds the scale itself (e8m0 powers of two:
OCP MX v1.0 section 6.3; e4m3 under a second, per-tensor scale: NVFP4, arXiv 2509.25149 appendix B).

A block of zeros gets the smallest scale, never zero. A block with NaN or infinity gets a scale that is not finite
(symmetric: NaN) whatever the clip, so that all of it decodes to NaN: nothing non-finite disappears in a quantizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .formats import NumberFormat
from .formats.floating import E4M3

MIN_SCALE = 2.0**-100
"""Default floor of scales: below it 1/scale or x/scale could overflow float32; 8e-31 is beneath any gradient."""

MSE_RATIOS = tuple(1.0 - i / 40 for i in range(33))
"""Shrinkage grid of the MSE clip: 1.0 down to 0.2 in steps of 0.025 of absmax (the optimum is flat: the error
between two grid points is second order)."""

FOUR_SIX_RATIOS = (1.0, 1.5)
"""Of the scale: the largest element of a block becomes 6, or 4 = 6 / 1.5, whose neighbours on the e2m1 grid are nearer
("Four Over Six", arXiv 2512.02010)."""

FOUR_SIX_TOP = 256.0
"""What the largest block scale is under a tensor scale with the 4/6 clip: 1.5 times it, 384, is an e4m3 number too,
and 1.5 * 448 is beyond the format."""


def absmax(blocks: Tensor) -> Tensor:
    """[nr, r, nc, c] -> [nr, 1, nc, 1]."""
    return blocks.abs().amax((1, 3), keepdim=True)


def rank_from_top(blocks: Tensor, counts: Tensor, percent: float) -> Tensor:
    """The largest value of each block after leaving out (100 - percent)% of its elements from the top."""
    nr, _, nc, _ = blocks.shape
    flat = blocks.permute(0, 2, 1, 3).reshape(nr, nc, -1)
    left_out = torch.floor(
        counts.reshape(counts.shape[0], counts.shape[2]) * ((100.0 - percent) / 100.0) + 1e-6
    )
    left_out = left_out.to(torch.int64).expand(nr, nc)
    top = torch.sort(flat, descending=True).values
    return torch.gather(top, 2, left_out[..., None]).reshape(nr, 1, nc, 1)


def _unit(blocks: Tensor) -> Tensor:
    """A power of two near absmax, [nr, 1, nc, 1]: dividing by it is exact, and squares of the quotients neither
    overflow nor vanish, whatever the magnitude of the block."""
    return torch.clamp(_power_of_two_floor(absmax(blocks)), 2.0**-126, 2.0**126)


def root_mean_square(blocks: Tensor, counts: Tensor) -> Tensor:
    """[nr, r, nc, c] -> [nr, 1, nc, 1], over the true elements."""
    unit = _unit(blocks)
    return torch.sqrt((blocks * (1.0 / unit)).square().sum((1, 3), keepdim=True) / counts) * unit


def mean_magnitude(blocks: Tensor, counts: Tensor) -> Tensor:
    """[nr, r, nc, c] -> [nr, 1, nc, 1], the mean of |x| over the true elements (BitNet b1.58, arXiv 2402.17764)."""
    unit = _unit(blocks)
    return (blocks * (1.0 / unit)).abs().sum((1, 3), keepdim=True) / counts * unit


def best_ratio(
    blocks: Tensor, round_at: Callable[[float], Tensor], ratios: tuple[float, ...] = MSE_RATIOS
) -> Tensor:
    """Per block, the first of ``ratios`` whose ``round_at(ratio)`` (blocks -> blocks) errs least."""
    inverse_unit = 1.0 / _unit(blocks)

    def error_at(ratio: float) -> Tensor:
        return ((round_at(ratio) - blocks) * inverse_unit).square().sum((1, 3), keepdim=True)

    best_error = error_at(ratios[0])
    best = torch.full_like(best_error, ratios[0])
    for ratio in ratios[1:]:
        error = error_at(ratio)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, ratio, best)
    return best


@cache
def gaussian_clip(number_format: NumberFormat) -> float:
    """The k that minimises E (Q(z) - z)^2 over z ~ N(0, 1) when the grid ends at k.

    With levels q_i, decided at thresholds t_i, and the Gaussian's density f and distribution F, exactly

        E (Q(z) - z)^2 = 1 + sum_i q_i^2 (F(t_i+1) - F(t_i)) + 2 q_i (f(t_i+1) - f(t_i))

    Golden-section search around the best of a coarse grid. QuEST's published constants for midrise grids agree
    within 0.001 up to 5 bits and 0.0015 at 6; at 7 and 8 bits, where the optimum is flat, theirs lie 0.01 and
    0.04 below the minimum.
    """
    levels = number_format.levels().to(torch.float64) / number_format.max
    thresholds = number_format.thresholds().to(torch.float64) / number_format.max
    end = torch.zeros(1, dtype=torch.float64)

    def error(k: float) -> float:
        q, middle = levels * k, thresholds * k
        distribution = torch.cat([end, torch.special.ndtr(middle), end + 1.0])
        density = torch.cat([end, torch.exp(-middle * middle / 2) / math.sqrt(2 * math.pi), end])
        return float(1.0 + (q * q * distribution.diff() + 2 * q * density.diff()).sum())

    coarse = [0.4 + 0.05 * i for i in range(153)]
    start = min(coarse, key=error)
    low, high = start - 0.05, start + 0.05
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(24):  # 0.1 * golden^24 < 1e-6
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if error(a) < error(b) else (a, high)
    return (low + high) / 2


def _power_of_two_floor(x: Tensor) -> Tensor:
    """2^floor(log2 x) for x > 0, NaN and infinity kept (as NaN)."""
    return torch.where(torch.isfinite(x), (x.view(torch.int32) & 0x7F800000).view(torch.float32), torch.nan)


def e8m0(scale: Tensor, amax: Tensor, number_format: NumberFormat, rule: str) -> Tensor:
    """Round scales to powers of two, 2^-126 .. 2^127. rule:

    ``e8m0``           2^(floor(log2 amax) - emax), emax = floor(log2 format.max), OCP's: it saturates a block whose
                       largest mantissa exceeds the format's
    ``e8m0_ceil``      the least power of two >= scale, which never saturates
    ``e8m0_down``      the greatest power of two <= scale (Quartet's forward, arXiv 2505.14669)
    ``e8m0_prescale``  OCP's; values are multiplied by ``prescale(format)`` < 1 so that nothing saturates
    """
    if rule in ("e8m0_ceil", "e8m0_down"):
        power = _power_of_two_floor(scale)
        if rule == "e8m0_ceil":
            power = torch.where(power < scale, power * 2, power)
    else:
        power = _power_of_two_floor(amax) * 2.0 ** -math.floor(math.log2(number_format.max))
    return torch.clamp(power, min=2.0**-126)


def prescale(number_format: NumberFormat) -> float:
    """format.max over the least power of two above it: 3/4 for e2m1 ("Training LLMs with MXFP4", arXiv 2502.20586,
    section 3.1): OCP's scale leaves amax / scale below that power. Its inverse multiplies the product of the GEMM,
    16/9 of two such operands; here it is part of the scale."""
    return number_format.max / 2.0 ** (math.floor(math.log2(number_format.max)) + 1)


def e4m3_under_tensor_scale(scale: Tensor, largest: Tensor, top: float) -> tuple[Tensor, Tensor]:
    """Scales -> (e4m3 values [nr, 1, nc, 1], tensor scale 0-d) with scale ~ e4m3 * tensor_scale.

    largest: 0-d, the scale that becomes ``top``, so tensor_scale = largest / top; a block whose scale would round to
    zero keeps the smallest e4m3 number.
    """
    tensor_scale = torch.clamp(largest / top, min=2.0**-126)
    stored = E4M3.round(scale * (1.0 / tensor_scale))
    return torch.clamp(stored, min=2.0**-9), tensor_scale
