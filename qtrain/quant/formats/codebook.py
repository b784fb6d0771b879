"""Codebooks: formats given by the list of their levels.

    dynamic<b>           dynamic tree quantization (Dettmers et al., 2021, arXiv 2110.02861, section 2.1): a
                         sign, a unary count of decades, and a linear fraction in the bits that remain
    dynamic<b>_unsigned  the same for non-negative numbers: one fraction bit more
    linear4_nozero       (i + 1)/16, i = 0..15: the 4-bit map for Adam's second moment that cannot decode to
                         zero (Li et al., 2023, arXiv 2309.01507, section 3.2)

Nearest is decided at midpoints, ties to the lower level. Codes are ranks in the sorted list.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .base import NumberFormat


@dataclass(frozen=True)
class CodebookFormat(NumberFormat):
    """A format with the given strictly increasing levels, 2 to 256 of them."""

    name: str
    table: tuple[float, ...] = field(repr=False)
    exact_in_bf16 = False

    def __post_init__(self) -> None:
        if not 2 <= len(self.table) <= 256 or any(
            a >= b for a, b in zip(self.table, self.table[1:], strict=False)
        ):
            raise ValueError(
                f"codebook {self.name!r} needs 2 to 256 strictly increasing levels, got {len(self.table)}"
            )

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

    def _nearest(self, v: Tensor) -> Tensor:
        levels = torch.tensor(self.table, dtype=torch.float32, device=v.device)
        return torch.bucketize(v, (levels[1:] + levels[:-1]) / 2)

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
