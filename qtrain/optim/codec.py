"""Tables that encode and decode optimizer states fast, to the same bits as ``qtrain.quant``.

A codebook rounds by binary search, once to a level and once more to its code: 70 ns an element for the dynamic
map on one CPU core, twenty times the rest of an Adam step. Rounding is monotone, however, so that a cell of
65536 neighbouring float32 patterns (equal upper 16 bits: sign, exponent and 7 bits of fraction) meets two codes
at most wherever the grid is coarser than 2^-7 of the value. One table then answers any rounding:

    entry = table[bits(v) >> 16] = (last lower pattern of the first code, second code, first code)
    code  = first if (bits(v) & 0xFFFF) <= lower pattern else second

The table is found by bisection over the patterns with the format's own ``round`` and ``encode``, so that ties
fall as they do there and formats from outside work too; a format too fine for it has no table. Codes of a NaN
are unspecified: its block's scale is NaN and decodes all of it to NaN.

F rows, K columns, of the matrix that a state is; nc blocks of c columns a row.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from qtrain.quant import NumberFormat, QTensor, QuantSpec, dequantize, quantize
from qtrain.quant.formats import IntegerFormat

CELLS = 1 << 16


def _code_at(number_format: NumberFormat, patterns: Tensor) -> Tensor:
    """int64 patterns below 2^32 -> int64 codes of the float32 they spell."""
    signed = torch.where(patterns >= 1 << 31, patterns - (1 << 32), patterns)
    values = signed.to(torch.int32).view(torch.float32)
    return number_format.encode(number_format.round(values)).to(torch.int64)


@cache
def code_table(number_format: NumberFormat) -> Tensor | None:
    """[65536] int32 entries (pattern << 16 | second << 8 | first), on the CPU; None where a cell meets more than
    two codes."""
    cells = torch.arange(CELLS, dtype=torch.int64) << 16
    first, second = _code_at(number_format, cells), _code_at(number_format, cells | 0xFFFF)
    infinite = (cells >> 16) & 0x7FFF == 0x7F80  # begins with infinity, goes on with NaNs: all saturate
    second = torch.where(infinite, first, second)
    low, high = torch.zeros_like(cells), torch.full_like(cells, 0xFFFF)
    for _ in range(16):  # halves 2^16 patterns down to one
        middle = (low + high + 1) >> 1
        still_first = _code_at(number_format, cells | middle) == first
        low, high = torch.where(still_first, middle, low), torch.where(still_first, high, middle - 1)
    after = _code_at(number_format, cells | torch.clamp(low + 1, max=0xFFFF))
    if not bool(((first == second) | (after == second)).all()):
        return None
    entry = (low << 16) | (second << 8) | first
    return torch.where(entry >= 1 << 31, entry - (1 << 32), entry).to(torch.int32)


@cache
def _code_table_on(number_format: NumberFormat, device: torch.device) -> Tensor | None:
    table = code_table(number_format)
    return None if table is None else table.to(device)


@cache
def _levels_on(number_format: NumberFormat, device: torch.device) -> Tensor:
    """[256] what a byte of codes decodes to: float32 (8 bits), or two float32 seen as one float64 (4 bits)."""
    codes = torch.arange(256, dtype=torch.uint8)
    if number_format.bits == 8:
        return number_format.decode(codes).to(device)
    pairs = torch.stack([number_format.decode(codes & 15), number_format.decode(codes >> 4)], -1)
    return pairs.view(torch.float64).reshape(256).to(device)


def nearest_codes(v: Tensor, number_format: NumberFormat) -> Tensor:
    """float32 in units of the scale -> uint8 codes of the nearest grid values, of the same shape."""
    if isinstance(number_format, IntegerFormat):  # arithmetic beats any table
        return number_format.encode(number_format.round(v))
    table = _code_table_on(number_format, v.device)
    if table is None:
        return number_format.encode(number_format.round(v))
    bits = v.contiguous().view(torch.int32)
    entry = table.index_select(0, ((bits >> 16) & 0xFFFF).reshape(-1)).reshape(v.shape)
    is_first = (bits & 0xFFFF) <= ((entry >> 16) & 0xFFFF)
    return torch.where(is_first, entry, entry >> 8).to(torch.uint8)  # the conversion keeps the low byte


def _plain(spec: QuantSpec) -> bool:
    """Whether the tables know this layout: whole or half bytes, one float32 absmax scale a block."""
    return spec.symmetric and spec.scale_format == "float32" and not spec.tensor_scale and spec.bits in (4, 8)


def encode(x: Tensor, spec: QuantSpec, noise: Tensor | None = None) -> QTensor:
    """``qtrain.quant.quantize`` for a matrix [F, K], bit for bit (NaN codes excepted), faster where it can be."""
    if spec.stochastic or spec.clip != "absmax" or not _plain(spec) or x.numel() == 0:
        return quantize(x, spec, noise)
    tiling = spec.blocks
    blocks = tiling.blocks(x.to(torch.float32))  # [F/r, r, nc, c]
    amax = blocks.abs().amax((1, 3), keepdim=True)
    # A tensor divisor, as in qtrain.quant: CUDA multiplies by the reciprocal of a Python scalar
    scale = torch.clamp(amax / torch.full_like(amax, spec.number_format.max), min=spec.min_scale)
    codes = tiling.unblock(
        nearest_codes(blocks * (1.0 / scale), spec.number_format), (x.shape[0], x.shape[1])
    )
    if spec.bits == 4:
        codes = torch.nn.functional.pad(codes, (0, 1)) if x.shape[1] % 2 else codes
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return QTensor(
        codes.contiguous(), scale.reshape(scale.shape[0], scale.shape[2]), None, None, tuple(x.shape), spec
    )


def decode(q: QTensor) -> Tensor:
    """``qtrain.quant.dequantize`` for a matrix: float32 [F, K], bit for bit, faster where it can be."""
    if not _plain(q.spec) or q.codes.numel() == 0:
        return dequantize(q)
    rows, columns = q.shape
    levels = _levels_on(q.spec.number_format, q.codes.device)
    flat = levels.index_select(0, q.codes.reshape(-1).to(torch.int32))
    values = flat.view(torch.float32).reshape(rows, -1)
    values = values if values.shape[1] == columns else values[:, :columns]
    block_columns = q.spec.blocks.block_shape(rows, columns)[1]
    if columns % block_columns:
        return values * q.spec.blocks.expand(q.scale, (rows, columns))
    blocks = values.reshape(rows, -1, block_columns)  # [F, nc, c] * [F or 1, nc, 1]
    return (blocks * q.scale[:, :, None]).reshape(rows, columns)


def without_noise(spec: QuantSpec) -> QuantSpec:
    """The same layout, rounded to nearest."""
    return replace(spec, rounding="nearest")
