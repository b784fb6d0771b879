"""Orthogonal maps of a contraction axis: T(a) T(b)^T = a b^T, but T(a) is easier to quantize than a.

    hadamard:B  x -> x H_B blockwise along the last axis; H_B[i, j] = (-1)^popcount(i & j) / sqrt(B)
    rht:B       the randomized one, x -> (x * s) H_B, signs s fresh each step from the counter hash
    package.module:Name  a Transform of your own (``qtrain.quant.plugins``)

A transform cancels only if both operands of a GEMM share it, so it belongs to the GEMM (``recipe``).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .plugins import is_plugin, load_instance


@cache
def _sylvester(block: int) -> Tensor:
    """H_B [B, B] float32, orthogonal and symmetric (Sylvester's construction)."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return (h / block**0.5).to(torch.float32)


def _fits(block: int) -> bool:
    return 2 <= block <= 1024 and block & (block - 1) == 0


class Transform(ABC):
    """An orthogonal map of the last axis, stateless and hashable.

    randomized: whether it takes signs, fresh each step from the counter hash and shared by both operands of a GEMM.
    """

    randomized: bool = False

    @abstractmethod
    def forward(self, x: Tensor, signs: Tensor | None = None) -> Tensor:
        """x [..., K] -> float32 [..., K]; ``signs`` [K] of +-1 exactly when randomized (else ValueError)."""

    @abstractmethod
    def inverse(self, x: Tensor, signs: Tensor | None = None) -> Tensor:
        """The transpose of ``forward``, float32, with the same signs."""

    def check(self, contraction: int, where: str) -> None:  # noqa: B027 (by default it maps every length)
        """Raises ValueError, beginning with ``where``, for a contraction length that it cannot map."""

    def __str__(self) -> str:
        return f"{type(self).__module__}:{type(self).__qualname__}"

    @staticmethod
    @cache
    def parse(text: str) -> Transform:
        """From ``hadamard:B``, ``rht:B``, B a power of two from 2 to 1024, or ``package.module:Name``.

        Raises ValueError for anything else, TypeError for a plug-in that is no Transform.
        """
        match = re.fullmatch(r"(hadamard|rht):(\d+)", text)
        if match and _fits(int(match[2])):
            return Hadamard(int(match[2]), match[1] == "rht")
        if is_plugin(text) and text.split(":")[0] not in ("hadamard", "rht"):
            return load_instance(text, "transform", Transform)
        raise ValueError(
            f"transform {text!r}: allowed are hadamard:B and rht:B, B a power of two from 2 to 1024, or "
            "package.module:Name"
        )


@dataclass(frozen=True)
class Hadamard(Transform):
    """A blockwise Hadamard transform, randomized or not."""

    block: int
    randomized: bool = False

    def __post_init__(self) -> None:
        if not _fits(self.block):
            raise ValueError(f"a Hadamard block of {self.block}: allowed are powers of two from 2 to 1024")

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
        self._check_signs(signs)
        x = x.to(torch.float32)
        return self._hadamard(x if signs is None else x * signs)

    def inverse(self, x: Tensor, signs: Tensor | None = None) -> Tensor:
        self._check_signs(signs)
        x = self._hadamard(x.to(torch.float32))
        return x if signs is None else x * signs
