"""Codebooks: formats given by the list of their levels.

    dynamic<b>           dynamic tree quantization (Dettmers et al., 2021, arXiv 2110.02861, section 2.1): a
                         sign, a unary count of decades, and a linear fraction in the bits that remain
    dynamic<b>_unsigned  the same for non-negative numbers: one fraction bit more
    linear4_nozero       (i + 1)/16, i = 0..15: the 4-bit map for Adam's second moment that cannot decode to
                         zero (Li et al., 2023, arXiv 2309.01507, section 3.2)
    nf4                  quantiles of the Gaussian (QLoRA, arXiv 2305.14314, section 3)
    sign, ternary        -1, +1 and -1, 0, +1
    power<b>             sign(y) |y|^(1/p) of a uniform grid of y, p = 1/3 (arXiv 2403.06408, section 4)

Nearest is decided at midpoints, or at boundaries that the format names; ties go to the lower level. Codes are ranks
in the sorted list.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

from .base import NumberFormat


@dataclass(frozen=True)
class CodebookFormat(NumberFormat):
    """A format with the given levels, 2 to 256 of them, finite, strictly increasing, the last one positive.

    boundaries: where rounding changes from one level to the next, one fewer than levels; None: at their midpoints.
    """

    name: str
    table: tuple[float, ...] = field(repr=False)
    boundaries: tuple[float, ...] | None = field(default=None, repr=False)
    exact_in_bf16: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        levels = self.table
        rising = all(a < b for a, b in pairwise(levels))
        if not 2 <= len(levels) <= 256 or not rising:
            raise ValueError(
                f"codebook {self.name!r} needs 2 to 256 strictly increasing levels, got {len(levels)}"
            )
        if not levels[-1] > 0 or not all(map(math.isfinite, levels)):
            raise ValueError(
                f"codebook {self.name!r} has levels from {levels[0]} to {levels[-1]}: they must be finite and the last "
                "one positive, since it is what the end of a range is scaled to"
            )
        between = self.boundaries
        if between is not None and (
            len(between) != len(levels) - 1
            or not all(a <= t <= b for a, t, b in zip(levels, between, levels[1:], strict=False))
        ):
            raise ValueError(
                f"codebook {self.name!r} needs one boundary between each level and the next, got {len(between)}"
            )
        # 8 significant bits
        exact = all((math.frexp(x)[0] * 256).is_integer() for x in levels)
        object.__setattr__(self, "exact_in_bf16", exact)

    @property  # not cached: a compiler that traces the first use would meet the lock inside cached_property
    def bits(self) -> int:  # type: ignore[override]
        return (len(self.table) - 1).bit_length()

    @property
    def min(self) -> float:  # type: ignore[override]
        return self.table[0]

    @property
    def max(self) -> float:  # type: ignore[override]
        return self.table[-1]

    @cached_property
    def widest_gap(self) -> float:  # type: ignore[override]
        return max(b - a for a, b in zip(self.table, self.table[1:], strict=False))

    def thresholds(self) -> Tensor:
        if self.boundaries is None:
            return super().thresholds()
        return torch.tensor(self.boundaries, dtype=torch.float32)

    def _nearest(self, v: Tensor) -> Tensor:
        if self.boundaries is None:
            levels = torch.tensor(self.table, dtype=torch.float32, device=v.device)
            return torch.bucketize(v, (levels[1:] + levels[:-1]) / 2)
        return torch.bucketize(v, torch.tensor(self.boundaries, dtype=torch.float32, device=v.device))

    def round(self, v: Tensor, noise: Tensor | None = None) -> Tensor:
        levels = torch.tensor(self.table, dtype=torch.float32, device=v.device)
        if noise is None:
            rounded = levels[self._nearest(v)]
        else:
            # lower <= v < upper; beyond the ends both fractions saturate to the end level
            lower = torch.clamp(torch.bucketize(v, levels, right=True) - 1, 0, len(self.table) - 2)
            low, high = levels[lower], levels[lower + 1]
            rounded = torch.where(noise < (v - low) / (high - low), high, low)
        return torch.where(torch.isnan(v), v, rounded)

    def encode(self, values: Tensor) -> Tensor:
        return self._nearest(torch.nan_to_num(values, nan=0.0)).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        padding = (2**self.bits - len(self.table)) * (float("nan"),)
        levels = torch.tensor(self.table + padding, dtype=torch.float32, device=codes.device)
        return levels[codes.to(torch.int64)]

    def unsigned(self) -> CodebookFormat:
        if self.min >= 0:
            return self
        if self.name.startswith("dynamic"):
            return dynamic_tree(self.bits, signed=False)
        raise ValueError(f"codebook {self.name!r} has no unsigned counterpart")


def dynamic_tree(bits: int, *, signed: bool) -> CodebookFormat:
    """The dynamic tree map of `bits` bits.

    Decade d = 0 .. D-1 (D = bits - 1) spans (10^(d-D), 10^(d-D+1)] and holds the midpoints of 2^d (signed) or
    2^(d+1) (unsigned) equal cells of it; zero and one complete the 2^bits levels.
    """
    decades = bits - 1
    positive = [
        10.0 ** (d - decades + 1) * (0.1 + 0.9 * (i + 0.5) / cells)
        for d in range(decades)
        for cells in [2**d if signed else 2 ** (d + 1)]
        for i in range(cells)
    ]
    levels = [0.0, 1.0, *positive] + ([-p for p in positive] if signed else [])
    suffix = "" if signed else "_unsigned"
    return CodebookFormat(f"dynamic{bits}{suffix}", tuple(sorted(levels)))


def normal_float4() -> CodebookFormat:
    """NF4: quantiles of N(0, 1), normalised to end at +-1.

    With D = (1 - 1/32 + 1 - 1/30) / 2, the probability at which a grid of 2^4 equal cells ends (the mean of the
    ends of 16 and 15 cells): 8 quantiles evenly between D and 1/2 for the positive half, 7 for the negative one,
    and zero, which is exact (QLoRA, arXiv 2305.14314, appendix E).
    """
    end, inverse = (1 - 1 / 32 + 1 - 1 / 30) / 2, NormalDist().inv_cdf
    positive = [inverse(end + (0.5 - end) * i / 8) for i in range(8)]
    negative = [-inverse(end + (0.5 - end) * i / 7) for i in range(7)]
    levels = sorted([*negative, 0.0, *positive])
    return CodebookFormat("nf4", tuple(level / levels[-1] for level in levels))


POWER = 1 / 3
"""The exponent of ``power<b>`` (arXiv 2403.06408, section 4)."""


def power_law(bits: int, p: float = POWER) -> CodebookFormat:
    """y = sign(x) |x|^p, rounded uniformly, and back: 2^bits - 1 levels sign(i) |i / n|^(1/p), n = 2^(bits-1) - 1.

    Rounding is decided in y, as in the paper: at |(i + 1/2) / n|^(1/p), which is nearer to the lower level than the
    midpoint is. Named ``power<bits>`` for p = 1/3, else ``power<bits>p<p>``. Raises ValueError unless bits is 2 to 8
    and p within 0.1 to 4 (beyond, neighbours merge in float32).
    """
    if not 2 <= bits <= 8 or not 0.1 <= p <= 4.0:
        raise ValueError(
            f"power-law format of {bits} bits with p={p:g}: allowed are 2 to 8 bits and p from 0.1 to 4, as in "
            "power4 (p = 1/3) or power4p0.5"
        )
    n = 2 ** (bits - 1) - 1

    def x_of(y: float) -> float:
        return math.copysign(abs(y) ** (1 / p), y)

    return CodebookFormat(
        f"power{bits}" if p == POWER else f"power{bits}p{p:g}",
        tuple(x_of(i / n) for i in range(-n, n + 1)),
        tuple(x_of((i + 0.5) / n) for i in range(-n, n)),
    )
