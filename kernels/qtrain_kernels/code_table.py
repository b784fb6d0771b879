"""One table that rounds float32 numbers to the codes of any monotone format of at most 8 bits.

A cell of 65536 neighbouring float32 patterns (equal upper 16 bits: sign, exponent and 7 bits of fraction) meets two
codes at most wherever the grid is coarser than 2^-7 of the value. So one look-up rounds:

    entry = table[bits(v) >> 16] = (last lower pattern of the first code, second code, first code)
    code  = first if (bits(v) & 0xFFFF) <= lower pattern else second

The table is found by bisection over the patterns with the format's own rounding, so that ties fall as they do there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CELLS = 1 << 16


def code_table(codes: Callable[[Tensor], Tensor]) -> Tensor | None:
    """[65536] int32 entries (pattern << 16 | second << 8 | first), on the CPU; None where a cell meets more than
    two codes.

    codes: any float32 -> its code below 256, of the same shape and any integer dtype; monotone within each sign.
    """

    def at(patterns: Tensor) -> Tensor:  # int64 patterns below 2^32
        signed = torch.where(patterns >= 1 << 31, patterns - (1 << 32), patterns)
        return codes(signed.to(torch.int32).view(torch.float32)).to(torch.int64)

    cells = torch.arange(CELLS, dtype=torch.int64) << 16
    first, second = at(cells), at(cells | 0xFFFF)
    infinite = (cells >> 16) & 0x7FFF == 0x7F80  # begins with infinity, goes on with NaNs: all saturate
    second = torch.where(infinite, first, second)
    low, high = torch.zeros_like(cells), torch.full_like(cells, 0xFFFF)
    for _ in range(16):  # halves 2^16 patterns down to one
        middle = (low + high + 1) >> 1
        still_first = at(cells | middle) == first
        low, high = torch.where(still_first, middle, low), torch.where(still_first, high, middle - 1)
    after = at(cells | torch.clamp(low + 1, max=0xFFFF))
    if not bool(((first == second) | (after == second)).all()):
        return None
    entry = (low << 16) | (second << 8) | first
    return torch.where(entry >= 1 << 31, entry - (1 << 32), entry).to(torch.int32)


def look_up(table: Tensor, v: Tensor) -> Tensor:
    """float32 -> uint8 codes of the same shape; ``table`` on v's device."""
    bits = v.contiguous().view(torch.int32)
    entry = table.index_select(0, ((bits >> 16) & 0xFFFF).reshape(-1)).reshape(v.shape)
    is_first = (bits & 0xFFFF) <= ((entry >> 16) & 0xFFFF)
    return torch.where(is_first, entry, entry >> 8).to(torch.uint8)  # the conversion keeps the low byte
