"""Packing: codes of b bits, side by side in bytes, each row by itself, so that rows can be cut apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _unit(bits: int) -> tuple[int, int]:
    """The least number of codes that fills whole bytes, and how many bytes: 4 bits -> (2, 1), 3 -> (8, 3)."""
    divisor = math.gcd(8, bits)
    return 8 // divisor, bits // divisor


def pack(codes: Tensor, bits: int) -> Tensor:
    """[..., K] uint8 codes below 2^bits -> [..., bytes] uint8, little-endian, rows padded to whole bytes."""
    if bits == 8:
        return codes.contiguous()
    unit_codes, unit_bytes = _unit(bits)
    if codes.shape[-1] % unit_codes:
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % unit_codes))
    units = codes.unflatten(-1, (-1, unit_codes)).to(torch.int64)
    word = sum((units[..., i] << (bits * i)) for i in range(1, unit_codes)) + units[..., 0]
    return torch.stack([(word >> (8 * j)) & 0xFF for j in range(unit_bytes)], -1).flatten(-2).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of ``pack``: [..., bytes] -> [..., count] uint8."""
    if bits == 8:
        return packed
    unit_codes, unit_bytes = _unit(bits)
    units = packed.unflatten(-1, (-1, unit_bytes)).to(torch.int64)
    word = sum((units[..., j] << (8 * j)) for j in range(1, unit_bytes)) + units[..., 0]
    codes = torch.stack([(word >> (bits * i)) & (2**bits - 1) for i in range(unit_codes)], -1).flatten(-2)
    return codes[..., :count].to(torch.uint8)
