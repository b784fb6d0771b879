"""Tables that encode and decode optimizer states fast, to the same bits as ``qtrain.quant``.

A codebook rounds by binary search, once to a level and once more to its code: 70 ns an element for the dynamic
map on one CPU core, twenty times the rest of an Adam step. One look-up in a table made of the format's own ``round`` and
``encode`` (``qtrain_kernels.code_table``) gives the same code, for formats from outside too; a format too fine for it
has no table. Codes of a NaN are unspecified: its block's scale is NaN and decodes all of it to NaN.

F rows, K columns, of the matrix that a state is; nc blocks of c columns a row.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import qtrain_kernels.code_table
import torch
from torch import Tensor

from qtrain.quant import NumberFormat, QTensor, QuantSpec, dequantize, quantize
from qtrain.quant.formats import IntegerFormat


@cache
def code_table(number_format: NumberFormat) -> Tensor | None:
    """``qtrain_kernels.code_table`` of a format, on the CPU; None where it has none."""
    return qtrain_kernels.code_table.code_table(lambda v: number_format.encode(number_format.round(v)))


@cache
def code_table_on(number_format: NumberFormat, device: torch.device) -> Tensor | None:
    """``code_table`` on a device, made once."""
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
    table = code_table_on(number_format, v.device)
    if table is None:
        return number_format.encode(number_format.round(v))
    return qtrain_kernels.code_table.look_up(table, v)


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
