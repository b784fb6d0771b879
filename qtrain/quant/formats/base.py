"""What a number format is: a finite grid of numbers, told apart by `bits`-wide codes.

A format knows nothing of scales. ``round`` works on v = x / scale and answers grid values, also in units of the
scale, so that the caller decides whether to encode them (storage), multiply them (a GEMM on codes) or scale
them back (fake quantization).

Invariants, each a test: round(round(v)) == round(v); v <= w implies round(v) <= round(w);
decode(encode(g)) == g for every grid value g; encode(decode(c)) == c for every code c that names a number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class NumberFormat(ABC):
    """A stateless, hashable grid of numbers. Subclasses are frozen dataclasses.

    name: how configs call it. bits: width of a code, 1 to 8. min, max: the ends of the grid, in units of the
    scale. widest_gap: the largest distance between neighbours on the grid. exact_in_bf16: every grid value is
    a bfloat16, so that a bf16 GEMM on grid values is exact up to its accumulation.
    """

    name: str
    bits: int
    min: float
    max: float
    widest_gap: float
    exact_in_bf16: bool

    @abstractmethod
    def round(self, v: Tensor, noise: Tensor | None = None) -> Tensor:
        """float32 -> the grid, same shape. Values beyond the ends saturate; NaN stays NaN.

        noise: None rounds to nearest, or uniform float32 in [0, 1) of v's shape, with which v is rounded up
        with the probability that makes the result unbiased (Gupta et al., 2015, arXiv 1502.02551).
        """

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """Grid values (float32) -> codes (uint8, 0 to 2^bits - 1). NaN becomes the code of zero (or of the value
        nearest to it): what is not a number is carried by the scale."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (uint8) -> grid values (float32)."""

    def levels(self) -> Tensor:
        """All grid values, sorted, without repetition: float32, at most 2^bits of them."""
        decoded = self.decode(torch.arange(2**self.bits, dtype=torch.uint8))
        return torch.unique(decoded[torch.isfinite(decoded)])

    def thresholds(self) -> Tensor:
        """Where rounding to nearest changes from each level to the next: float32, one fewer than levels."""
        levels = self.levels()
        return (levels[1:] + levels[:-1]) / 2

    def unsigned(self) -> NumberFormat:
        """The format of equal bits for non-negative numbers; raises ValueError where there is none."""
        raise ValueError(
            f"format {self.name!r} has no unsigned counterpart; those with one: int2..int8, dynamic8, dynamic4"
        )
