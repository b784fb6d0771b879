"""Granularity: which elements of an operand share a scale.

An operand is seen K-major, [free, contraction]. Every granularity is a tiling of that matrix into equal blocks
of r rows and c columns, so one view and one broadcast serve all of them:

    tensor        one block              folds into a GEMM's epilogue
    row           1 x K                  folds
    column        F x 1                  lies on the contraction: can only be simulated
    group:G       1 x G                  lies on the contraction (MX, NVFP4: G = 32, 16)
    block:RxC     R x C                  likewise

Blocks at the ends may be ragged; they are filled with zeros, which no range estimate counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Granularity:
    """Blocks of ``rows`` x ``columns``; None stands for all of them. Made by ``Granularity.parse``."""

    rows: int | None
    columns: int | None

    @staticmethod
    def parse(text: str) -> Granularity:
        """From ``tensor | row | column | group:G | block:RxC``; raises ValueError for anything else."""
        named = {"tensor": (None, None), "row": (1, None), "column": (None, 1)}
        if text in named:
            return Granularity(*named[text])
        match = re.fullmatch(r"group:0*([1-9]\d*)|block:0*([1-9]\d*)x0*([1-9]\d*)", text)
        if not match:
            raise ValueError(
                f"granularity {text!r}: allowed are tensor, row, column, group:G and block:RxC with positive "
                "G, R, C, for example group:128 or block:128x128"
            )
        group, r, c = match.groups()
        return Granularity(1, int(group)) if group else Granularity(int(r), int(c))

    @property
    def folds(self) -> bool:
        """Whether the scales depend on the free index alone, so that a GEMM may multiply codes and scale its
        result."""
        return self.columns is None and self.rows in (None, 1)

    def block_shape(self, free: int, contraction: int) -> tuple[int, int]:
        return self.rows or max(free, 1), self.columns or max(contraction, 1)

    def scale_shape(self, free: int, contraction: int) -> tuple[int, int]:
        """The shape of the scales of a [free, contraction] operand."""
        r, c = self.block_shape(free, contraction)
        return -(-free // r), -(-contraction // c)

    def blocks(self, x: Tensor) -> Tensor:
        """[F, K] -> [F/r, r, K/c, c], ragged ends filled with zeros. A view where nothing is ragged."""
        free, contraction = x.shape
        r, c = self.block_shape(free, contraction)
        nr, nc = self.scale_shape(free, contraction)
        if nr * r != free or nc * c != contraction:
            x = torch.nn.functional.pad(x, (0, nc * c - contraction, 0, nr * r - free))
        return x.reshape(nr, r, nc, c)

    def unblock(self, blocks: Tensor, shape: tuple[int, int]) -> Tensor:
        """The inverse of ``blocks``: [F/r, r, K/c, c] -> [F, K]."""
        nr, r, nc, c = blocks.shape
        x = blocks.reshape(nr * r, nc * c)
        return x if x.shape == shape else x[: shape[0], : shape[1]]

    def expand(self, scale: Tensor, shape: tuple[int, int]) -> Tensor:
        """Scales [F/r, K/c] -> broadcastable against [F, K] (a full matrix where blocks tile both axes)."""
        if self.folds or self.rows is None:  # tensor [1, 1], row [F, 1], column [1, K]
            return scale
        r, c = self.block_shape(*shape)
        nr, nc = scale.shape
        return self.unblock(scale[:, None, :, None].expand(nr, r, nc, c), shape)

    def counts(self, shape: tuple[int, int], device: torch.device) -> Tensor:
        """How many true elements each block holds: float32, [F/r, 1, K/c, 1]."""
        sizes = []
        for n, b in zip(shape, self.block_shape(*shape), strict=True):
            starts = torch.arange(0, max(n, 1), b, device=device, dtype=torch.float32)
            sizes.append(torch.clamp(n - starts, max=float(b)))
        return (sizes[0][:, None] * sizes[1][None, :])[:, None, :, None]
