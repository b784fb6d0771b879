"""Rows of a matrix as bytes.

    a row [K] float32  ->  codes | scales | zero points        uint8, the same number of bytes for every row

A block never crosses a row, so that any process can encode its rows alone and any other decode them: what is sent for
a row doesn't depend on who holds it. Padding rows are zeros and decode to zeros.

Encoding what arrived gives the same bytes again,

    quantize(decode(encode(x))) = quantize(x)        codes and scales, bit for bit

for clip=absmax, nearest rounding, float32 scales, symmetric, of formats that end alike on both sides (not dynamic8): a
layer that quantizes what arrived meets the codes of the master. For a scale s = fl(a / max) of a float32 a satisfies fl(fl(s * max) / max) = s: the two roundings move a by less
than what the quotient tells apart. Checked for every mantissa by the tests; it isn't so for any s.

n rows, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qtrain.quant import QTensor, QuantSpec, dequantize, quantize


@dataclass(frozen=True)
class RowFormat:
    """How rows of ``columns`` float32 numbers travel: in ``spec``, or as they are where it is None."""

    columns: int
    spec: QuantSpec | None

    @staticmethod
    def of(columns: int, spec: QuantSpec | None) -> RowFormat:
        """In ``spec`` where that takes fewer bytes than the numbers themselves: very short rows pay for their scale."""
        exact = RowFormat(columns, None)
        coded = RowFormat(columns, spec)
        return coded if spec is not None and coded.row_bytes < exact.row_bytes else exact

    @cached_property
    def _sizes(self) -> tuple[int, ...]:
        """Bytes a row of codes, scales and zero points."""
        if self.spec is None:
            return (4 * self.columns,)
        blocks = self.spec.blocks.scale_shape(1, self.columns)[1]
        codes = quantize(torch.zeros(1, self.columns), self.spec, self._no_noise()).codes.shape[1]
        scale = 4 if self.spec.scale_format == "float32" else 1
        return codes, blocks * scale, 0 if self.spec.symmetric else blocks

    def _no_noise(self) -> Tensor | None:
        return torch.zeros(1, self.columns) if self.spec is not None and self.spec.stochastic else None

    @cached_property
    def row_bytes(self) -> int:
        return sum(self._sizes)

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """x [n, K] float32 -> [n, row_bytes] uint8. noise: uniform [n, K], needed exactly where the spec is
        stochastic."""
        if self.spec is None:
            return x.contiguous().view(torch.uint8)
        q = quantize(x, self.spec, noise)
        parts = (q.codes, q.scale, q.zero_point)
        return torch.cat([p.contiguous().view(torch.uint8) for p in parts if p is not None], 1)

    def decode(self, rows: Tensor) -> Tensor:
        """[n, row_bytes] uint8 -> [n, K] float32; a NaN scale makes its block NaN."""
        if self.spec is None:
            return rows.clone(memory_format=torch.contiguous_format).view(torch.float32)
        # Copies: what is contiguous already may begin at any byte, and float32 may not
        codes, scale, zero_point = (
            part.clone(memory_format=torch.contiguous_format) for part in rows.split(self._sizes, 1)
        )
        if self.spec.scale_format == "float32":
            scale = scale.view(torch.float32)
        shape = (rows.shape[0], self.columns)
        held = QTensor(codes, scale, None if self.spec.symmetric else zero_point, None, shape, self.spec)
        return dequantize(held)


@dataclass(frozen=True)
class Piece:
    """A parameter as it is shared out: ``rows`` of dim 0, and how each travels. name: its dotted name in the model."""

    name: str
    rows: int
    format: RowFormat

    @staticmethod
    def of(name: str, shape: torch.Size, spec: QuantSpec | None) -> Piece:
        """Vectors (gains, biases) travel as they are: they are few, and every element would be a row."""
        columns = shape[1:].numel()
        return Piece(name, shape[0], RowFormat.of(columns, spec if len(shape) > 1 else None))

    @property
    def columns(self) -> int:
        return self.format.columns

    @property
    def exact(self) -> Piece:
        """The same, as it is."""
        return Piece(self.name, self.rows, RowFormat(self.columns, None))

    def chunk(self, world: int) -> int:
        """Rows a process, the last ones padded: c."""
        return -(-self.rows // world)
