"""Numbers that say what quantization does to a tensor, and a step to a weight. Functions of tensors that give floats.

``x`` is what is to be quantized, ``q`` what it became, dequantized, of the same shape. Sums are float64. Of tensors that
are not finite they are nan, of empty ones too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qtrain.nn.observation import sqnr_db
from qtrain.quant import QuantSpec

__all__ = [
    "alignment",
    "angle",
    "changed",
    "clipped",
    "cosine",
    "kurtosis",
    "largest_inverse",
    "max_over_p999",
    "noise_floor",
    "oscillation",
    "saturated",
    "sqnr_db",
    "top_share",
    "underflow",
    "update_ratio",
    "z_loss",
    "zero_bin",
]

# A percentile of more elements is taken of evenly spaced ones: its error is then far below that of a batch
SAMPLED = 1 << 20
# Of subspace iteration; two passes find the energy of the leading directions to a percent (Halko, Martinsson and Tropp
# 2011, arXiv 0909.4061, section 4.5)
PASSES = 2


def _wide(t: Tensor) -> Tensor:
    return t.detach().to(torch.float64)


def _mean(marks: Tensor) -> float:
    return float(marks.to(torch.float64).mean())


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    a, b = float(numerator), float(denominator)
    return a / b if b else math.nan


def clipped(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> float:
    """Share of elements beyond the range. x [F, K]; scale, zero_point [F/r, K/c]."""
    shape = (x.shape[0], x.shape[1])
    v = x.to(torch.float32) / spec.blocks.expand(scale, shape)
    if zero_point is not None:
        v = v + spec.blocks.expand(zero_point, shape)
    grid = spec.number_format
    slack = 2.0**-20 * grid.max  # the extreme element over its own scale may exceed the end by rounding
    if zero_point is not None:
        slack += 0.5  # the zero point is a whole number: it moves the range by up to half a step
    return _mean((v > grid.max + slack) | (v < grid.min - slack))


def saturated(values: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> float:
    """Share of codes at an end of the range. values [F, K]: grid values less the zero point [F/r, K/c]. Of a symmetric
    range both ends are as far from 0, though the grid may have one more code below (int4: -8 to 7)."""
    grid = spec.number_format
    if zero_point is None:
        return _mean(values.abs() >= grid.max)
    values = values + spec.blocks.expand(zero_point, (values.shape[0], values.shape[1]))
    return _mean((values >= grid.max) | (values <= grid.min))


def underflow(x: Tensor, q: Tensor) -> float:
    """Share of elements that are not 0 and become 0."""
    return _mean((x != 0) & (q == 0))


def kurtosis(x: Tensor) -> float:
    """E (x - mean)^4 / var^2: 3 of a Gaussian; nan of a constant."""
    x = _wide(x)
    d = (x - x.mean()).square()
    return _ratio(d.square().mean(), d.mean().square())


def max_over_p999(x: Tensor) -> float:
    """Largest magnitude over the 99.9th percentile of magnitudes (the least that 99.9 % do not exceed)."""
    magnitudes = x.detach().abs().flatten()
    if not magnitudes.numel():
        return math.nan
    sampled = magnitudes[:: -(-magnitudes.numel() // SAMPLED)]
    rank = math.ceil(0.999 * sampled.numel())
    return _ratio(magnitudes.max(), sampled.to(torch.float32).kthvalue(rank).values)


def top_share(x: Tensor, k: int) -> float:
    """sum of the k largest squared singular values / sum of all, of a matrix [F, K]. By subspace iteration from a fixed
    start: never more than the true share."""
    x = x.detach().to(torch.float32)
    k = min(k, *x.shape)
    total = x.square().sum()
    if not (k and bool(total.isfinite()) and bool(total > 0)):
        return math.nan
    start = torch.randn(x.shape[1], k, generator=torch.Generator().manual_seed(0)).to(x.device)
    for _ in range(PASSES):
        start = torch.linalg.qr(x.t() @ (x @ start)).Q
    return _ratio((x @ start).square().sum(), total)


def cosine(seen: Tensor, exact: Tensor) -> float:
    """cos of the angle between two tensors."""
    a, b = _wide(seen), _wide(exact)
    return _ratio((a * b).sum(), a.norm() * b.norm())


def alignment(seen: Tensor, exact: Tensor) -> float:
    """<seen, exact> / <exact, exact>: 1 where nothing is lost or added along the exact gradient."""
    a, b = _wide(seen), _wide(exact)
    return _ratio((a * b).sum(), b.square().sum())


def noise_floor(seen: Tensor, exact: Tensor) -> float:
    """std(exact) / (sqrt(3) std(seen - exact)); inf where nothing was rounded."""
    a, b = _wide(seen), _wide(exact)
    signal, noise = float(b.std(correction=0)), math.sqrt(3.0) * float((a - b).std(correction=0))
    return signal / noise if noise else (math.inf if signal else math.nan)


def update_ratio(before: Tensor, after: Tensor) -> float:
    """norm(after - before) / norm(before)."""
    a, b = _wide(before), _wide(after)
    return _ratio((b - a).norm(), a.norm())


def angle(before: Tensor, after: Tensor) -> float:
    """Between two tensors, radians. By the half angle, since the arc cosine loses small ones (Kahan)."""
    a, b = _wide(before), _wide(after)
    if not (bool(a.norm() > 0) and bool(b.norm() > 0)):
        return math.nan
    a, b = a / a.norm(), b / b.norm()
    return 2.0 * math.atan2(float((a - b).norm()), float((a + b).norm()))


def oscillation(w_before: Tensor, w_after: Tensor, q_before: Tensor, q_after: Tensor) -> float:
    """sum |dQ(w)| / sum |dw|."""
    moved = (_wide(w_after) - _wide(w_before)).abs().sum()
    return _ratio((_wide(q_after) - _wide(q_before)).abs().sum(), moved)


def changed(before: Tensor, after: Tensor) -> float:
    """Share of codes that differ."""
    return _mean(before != after)


def zero_bin(true: Tensor, decoded: Tensor) -> float:
    """Share of second moments that decode to 0 and were above 0 before they were stored."""
    return _mean((true > 0) & (decoded == 0))


def largest_inverse(v: Tensor, eps: float) -> float:
    """max 1 / (sqrt(v) + eps) of a second moment."""
    least = float(v.min()) if v.numel() else math.nan
    return math.inf if least == 0 == eps else 1.0 / (math.sqrt(least) + eps)


def z_loss(logits: Tensor) -> float:
    """mean (ln sum exp logits)^2 over [.., V] (PaLM, arXiv 2204.02311, section 5), without its coefficient."""
    return float(logits.detach().to(torch.float32).logsumexp(-1).square().mean())
