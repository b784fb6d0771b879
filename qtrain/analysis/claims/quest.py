"""QuEST's clip, mask and grid (arXiv 2502.05003), derived anew."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qtrain.quant import QuantSpec, dequantize_values, quantize_values

from .bench import Bench, quality, rows_of
from .claim import Claim, Measured

SOURCE = "arXiv 2502.05003"
PUBLISHED = {1: 0.798, 2: 1.494, 3: 2.051, 4: 2.514, 5: 2.916, 6: 3.277, 7: 3.601, 8: 3.885}
TERNARY = 1.224
# Midpoints of cells, float64: the error of the integral is of the square of a cell, 1e-8
_Z = (torch.arange(160_000, dtype=torch.float64) + 0.5) * (10.0 / 160_000)
_DENSITY = torch.exp(-_Z.square() / 2) * math.sqrt(2 / math.pi) * (10.0 / 160_000)


def midrise_error(bits: int) -> Callable[[float], float]:
    """a -> E (Q(z) - z)^2 of z ~ N(0, 1), q = D (floor(z / D) + 1/2), D = 2a / (2^b - 1), clipped to its ends."""

    def error(a: float) -> float:
        step = 2 * a / (2**bits - 1)
        q = torch.clamp(step * (torch.floor(_Z / step) + 0.5), max=step * (2**bits - 1) / 2)
        return float(((q - _Z).square() * _DENSITY).sum())

    return error


def ternary_error(a: float) -> float:
    q = torch.where(a / 2 < _Z, a, 0.0)
    return float(((q - _Z).square() * _DENSITY).sum())


def minimum(error: Callable[[float], float], low: float, high: float) -> float:
    """The argument, by golden sections."""
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(40):
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if error(a) < error(b) else (a, high)
    return (low + high) / 2


def constants(_: Bench) -> Measured:
    worst = max(abs(minimum(midrise_error(b), 0.5, 5.0) - PUBLISHED[b]) for b in range(1, 7))
    return Measured.exactly(worst, "quadrature, 1 to 6 bits")


def excess(_: Bench) -> Measured:
    worst = 0.0
    for bits in (7, 8):
        error = midrise_error(bits)
        worst = max(worst, error(PUBLISHED[bits]) / error(minimum(error, 0.5, 5.0)) - 1)
    return Measured.exactly(100 * worst, "quadrature, 7 and 8 bits")


def ternary(_: Bench) -> Measured:
    return Measured.exactly(minimum(ternary_error, 0.5, 2.5), "quadrature")


def masked(x: Tensor) -> float:
    q = quantize_values(x, QuantSpec.parse("midrise4_row_gaussian_trust"))
    assert q.inside is not None
    return float((~q.inside).double().mean())


def trust(_: Bench) -> Measured:
    # The outermost level is a itself, and half a step lies beyond it
    outside = 1 - math.erf(PUBLISHED[4] * (1 + 1 / 15) / math.sqrt(2))
    ratios = [masked(rows_of("gaussian", 128, 2048, seed)) / outside for seed in range(5)]
    return Measured.mean(ratios, "Gaussian, 128 rows of 2048, 5 samples")


def mask_is_distance(_: Bench) -> Measured:
    spec, wrong = QuantSpec.parse("midrise4_row_gaussian_trust"), 0.0
    for seed in range(3):
        x = rows_of("student3", 64, 1024, seed)
        q = quantize_values(x, spec)
        assert q.inside is not None
        far = (dequantize_values(q.values, q.scale, spec) - x).abs() > q.scale / 2 * (1 + 1e-5)
        wrong = max(wrong, float((q.inside == far).double().mean()))
    return Measured.exactly(wrong, "Student-t3, 64 rows of 1024, 3 samples")


def quest_gain(_: Bench) -> Measured:
    samples = [rows_of("gaussian", 64, 1024, seed) for seed in range(5)]
    return Measured.mean([quality(x, "midrise4_row_gaussian") - quality(x, "int4_row") for x in samples], "Gaussian, 64 rows of 1024, 5 samples")  # fmt: skip


CLAIMS = (
    Claim(name="quest_constants", says="QuEST's clips are the optima of the squared error on N(0, 1)", source=SOURCE,
          quantity="largest distance of a to the optimum", high=0.005, measure=constants),
    Claim(name="quest_constants_78", says="also at 7 and 8 bits, where the optimum is flat", source=SOURCE,
          quantity="error above the least, %", high=1.0, measure=excess),
    Claim(name="quest_ternary", says="and the ternary clip is 1.224", source=SOURCE, quantity="the optimum",
          low=TERNARY - 0.002, high=TERNARY + 0.002, measure=ternary),
    Claim(name="trust_mask_share", says="On N(0, 1) the trust mask drops what lies half a step beyond the clip, 0.73 % at 4 bits", source=f"{SOURCE}, section 3.2",
          quantity="share masked over P(|z| > 2.514 * 16/15)", low=0.95, high=1.05, measure=trust),
    Claim(name="trust_mask", says="The mask drops exactly what moved by more than half a step", source=f"{SOURCE}, section 3.2",
          quantity="share of elements for which that is wrong", high=1e-4, measure=mask_is_distance),
    Claim(name="quest_beats_absmax", says="A clip at the optimum beats absmax at 4 bits", source=SOURCE,
          quantity="SQNR gained, dB", low=0.0, measure=quest_gain),
)  # fmt: skip
