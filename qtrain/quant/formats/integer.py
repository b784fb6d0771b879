"""Integers: uniform grids, two's complement (`int4`), unsigned (`uint4`) and without zero (`midrise4`).

int<b>      -2^(b-1) .. 2^(b-1) - 1
uint<b>     0 .. 2^b - 1                          (also the codes of an asymmetric int<b>)
midrise<b>  +-1/2, +-3/2, .. +-(2^b - 1)/2        (QuEST, arXiv 2502.05003: D*(round(x/D + 1/2) - 1/2))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import NumberFormat


def _round(v: Tensor, noise: Tensor | None) -> Tensor:
    if noise is None:
        return torch.round(v)  # ties to even
    floor = torch.floor(v)
    # Comparing the exact fraction loses nothing; floor(v + noise) would round v + noise to float32 first.
    return floor + (noise < v - floor).to(v.dtype)


@dataclass(frozen=True)
class IntegerFormat(NumberFormat):
    """`bits`-wide integers, two's complement or unsigned."""

    bits: int
    signed: bool = True
    widest_gap = 1.0
    exact_in_bf16 = True  # |integers| up to 256 are bfloat16 numbers

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or (self.signed and self.bits == 1):
            raise ValueError(f"integer of {self.bits} bits: allowed are int2..int8 and uint1..uint8")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{'' if self.signed else 'u'}int{self.bits}"

    @property
    def min(self) -> float:  # type: ignore[override]
        return -float(2 ** (self.bits - 1)) if self.signed else 0.0

    @property
    def max(self) -> float:  # type: ignore[override]
        return float(2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1)

    def round(self, v: Tensor, noise: Tensor | None = None) -> Tensor:
        return torch.clamp(_round(v, noise), self.min, self.max)

    def encode(self, values: Tensor) -> Tensor:
        integers = torch.nan_to_num(values, nan=0.0).to(torch.int16)
        return (integers & (2**self.bits - 1)).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        values = codes.to(torch.int16)
        if self.signed:
            sign = 2 ** (self.bits - 1)
            values = (values ^ sign) - sign
        return values.to(torch.float32)

    def unsigned(self) -> IntegerFormat:
        return IntegerFormat(self.bits, signed=False)


@dataclass(frozen=True)
class MidriseFormat(NumberFormat):
    """2^bits levels at odd multiples of one half: no zero, symmetric to the last level."""

    bits: int
    widest_gap = 1.0
    exact_in_bf16 = True  # 8 significant bits suffice up to 127.5

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"midrise grid of {self.bits} bits: allowed are midrise1..midrise8")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"midrise{self.bits}"

    @property
    def max(self) -> float:  # type: ignore[override]
        return (2**self.bits - 1) / 2

    @property
    def min(self) -> float:  # type: ignore[override]
        return -self.max

    def round(self, v: Tensor, noise: Tensor | None = None) -> Tensor:
        return torch.clamp(_round(v + 0.5, noise) - 0.5, self.min, self.max)

    def encode(self, values: Tensor) -> Tensor:
        return torch.nan_to_num(values + self.max, nan=float(2 ** (self.bits - 1))).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32) - self.max
