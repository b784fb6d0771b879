"""Orthogonal maps of a contraction axis: T(a) T(b)^T = a b^T, but T(a) is easier to quantize than a.

    hadamard:B  x -> x H_B blockwise along the last axis; H_B[i, j] = (-1)^popcount(i & j) / sqrt(B)
    rht:B       the randomized one, x -> (x * s) H_B, signs s fresh each step from the counter hash

A transform cancels only if both operands of a GEMM share it, so it belongs to the GEMM (``recipe``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@cache
def _sylvester(block: int) -> Tensor:
    """H_B [B, B] float32, orthogonal and symmetric (Sylvester's construction)."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return (h / block**0.5).to(torch.float32)


def _fits(block: int) -> bool:
    return 2 <= block <= 1024 and block & (block - 1) == 0


@dataclass(frozen=True)
class Transform:
    """A blockwise Hadamard transform, randomized or not. Made by ``Transform.parse``."""

    block: int
    randomized: bool = False

    def __post_init__(self) -> None:
        if not _fits(self.block):
            raise ValueError(f"a Hadamard block of {self.block}: allowed are powers of two from 2 to 1024")

    @staticmethod
    def parse(text: str) -> Transform:
        """From ``hadamard:B`` or ``rht:B``, B a power of two from 2 to 1024; else ValueError."""
        match = re.fullmatch(r"(hadamard|rht):(\d+)", text)
        if not match or not _fits(int(match[2])):
            raise ValueError(
                f"transform {text!r}: allowed are hadamard:B and rht:B, B a power of two from 2 to 1024"
            )
        return Transform(int(match[2]), match[1] == "rht")

    def __str__(self) -> str:
        return f"{'rht' if self.randomized else 'hadamard'}:{self.block}"

    def check(self, contraction: int, where: str) -> None:
        """Raises ValueError unless the block divides the contraction axis."""
        if contraction % self.block:
            fitting = max((b for b in (2**i for i in range(1, 11)) if contraction % b == 0), default=None)
            remedy = f"use a block of {fitting} or exclude the layer" if fitting else "exclude the layer"
            raise ValueError(
                f"{where}: the transform {self} needs a contraction divisible by {self.block}, got {contraction}; {remedy}"
            )

    def _check_signs(self, signs: Tensor | None) -> None:
        if (signs is not None) != self.randomized:
            raise ValueError(
                f"the transform {self} {'needs' if self.randomized else 'takes no'} signs; rht:{self.block} is the randomized one"
            )

    def _hadamard(self, x: Tensor) -> Tensor:
        h = _sylvester(self.block).to(x.device)
        return (x.unflatten(-1, (-1, self.block)) @ h).flatten(-2)

    def forward(self, x: Tensor, signs: Tensor | None = None) -> Tensor:
        """x [..., K] -> float32 [..., K]; ``signs`` [K] of +-1 exactly when randomized (else ValueError)."""
        self._check_signs(signs)
        x = x.to(torch.float32)
        return self._hadamard(x if signs is None else x * signs)

    def inverse(self, x: Tensor, signs: Tensor | None = None) -> Tensor:
        """The transpose of ``forward``, float32, with the same signs."""
        self._check_signs(signs)
        x = self._hadamard(x.to(torch.float32))
        return x if signs is None else x * signs
