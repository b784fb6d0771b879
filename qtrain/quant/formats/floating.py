"""Small floats: sign, exponent, mantissa, with subnormals, and every code that the standard allows a number.

    e4m3  bias 7,  max 448    (OCP FP8 "fn": no infinity, one NaN a sign; arXiv 2209.05433)
    e5m2  bias 15, max 57344  (IEEE-like: the top exponent is infinity and NaN)
    e3m4  bias 3,  max 15.5   (IEEE-like as well; no hardware multiplies it: emulated)
    e3m2  bias 3,  max 28     (OCP MX v1.0, FP6: no infinity, no NaN: all 64 codes are numbers)
    e2m3  bias 1,  max 7.5    (likewise)
    e2m1  bias 1,  max 6      (OCP MX v1.0, FP4: all 16 codes are numbers)

Rounding is to nearest, ties to even mantissa, saturating (a quantizer clips; it does not overflow). With
p = 2^floor(log2 |v|), read off the bits of the float32, the grid around v has the step
max(p, 2^(1 - bias)) * 2^-mantissa: one division, one rounding, no table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import NumberFormat
from .integer import _round


@dataclass(frozen=True)
class FloatFormat(NumberFormat):
    """exponent + mantissa + 1 bits; ``max`` decides how many codes of the top exponent are numbers."""

    exponent: int
    mantissa: int
    bias: int
    largest: float
    exact_in_bf16 = True  # at most 4 mantissa bits, exponents within bfloat16's

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"e{self.exponent}m{self.mantissa}"

    @property
    def bits(self) -> int:  # type: ignore[override]
        return 1 + self.exponent + self.mantissa

    @property
    def max(self) -> float:  # type: ignore[override]
        return self.largest

    @property
    def min(self) -> float:  # type: ignore[override]
        return -self.largest

    @property
    def widest_gap(self) -> float:  # type: ignore[override]
        return 2.0 ** (torch.tensor(self.largest).log2().floor().item() - self.mantissa)

    def round(self, v: Tensor, noise: Tensor | None = None) -> Tensor:
        power = (v.view(torch.int32) & 0x7F800000).view(torch.float32)
        step = torch.clamp(power, 2.0 ** (1 - self.bias), self.largest) * 2.0**-self.mantissa
        # Steps are powers of two wherever v is within range (beyond it the result is clamped): both exact.
        return torch.clamp(_round(v / step, noise) * step, -self.largest, self.largest)

    def _magnitudes(self, device: torch.device) -> Tensor:
        """Non-negative grid values in the order of their codes."""
        codes = torch.arange(2 ** (self.bits - 1), device=device)
        exponent, fraction = codes >> self.mantissa, codes & (2**self.mantissa - 1)
        significand = torch.where(exponent > 0, 2**self.mantissa + fraction, fraction).to(torch.float32)
        power = torch.clamp(exponent, min=1) - self.bias - self.mantissa
        values = torch.ldexp(significand, power)
        return torch.where(values <= self.largest, values, torch.nan)

    def encode(self, values: Tensor) -> Tensor:
        magnitudes = torch.nan_to_num(self._magnitudes(values.device), nan=float("inf"))
        values = torch.nan_to_num(values, nan=0.0)
        codes = torch.bucketize(
            values.abs(), magnitudes
        )  # codes of non-negative floats are in order of value
        return (codes | (torch.signbit(values).to(torch.int64) << (self.bits - 1))).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        magnitudes = self._magnitudes(codes.device)
        index = codes.to(torch.int64)
        values = magnitudes[index & (2 ** (self.bits - 1) - 1)]
        return torch.where(index >> (self.bits - 1) > 0, -values, values)


E4M3 = FloatFormat(4, 3, 7, 448.0)
E5M2 = FloatFormat(5, 2, 15, 57344.0)
E3M4 = FloatFormat(3, 4, 3, 15.5)
E3M2 = FloatFormat(3, 2, 3, 28.0)
E2M3 = FloatFormat(2, 3, 1, 7.5)
E2M1 = FloatFormat(2, 1, 1, 6.0)
