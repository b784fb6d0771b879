"""The Triton kernel of ``pack_bits``: a program packs BLOCK bytes of one row.

Rows of whole bytes are one long row. A thread holds all codes of its bytes, so that the sum over a byte stays in it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qtrain_kernels import pack_bits as declaration
from qtrain_kernels.aot import Build

BLOCK = 2048  # bytes: 4096 codes of 4 bits, 32 a thread


@triton.jit
def _pack_bits_kernel(codes_ptr, packed_ptr, K, B, BITS: tl.constexpr, BLOCK: tl.constexpr):
    along = tl.cdiv(B, BLOCK)
    row = (tl.program_id(0) // along).to(tl.int64)
    byte = (tl.program_id(0) % along).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.expand_dims(tl.arange(0, 8 // BITS), 0)  # [1, P]
    index = tl.expand_dims(byte, 1) * (8 // BITS) + place
    codes = tl.load(codes_ptr + row * K + index, mask=index < K, other=0).to(tl.int32)
    packed = tl.sum((codes & ((1 << BITS) - 1)) << (place * BITS), axis=1)
    tl.store(packed_ptr + row * B + byte, packed.to(tl.uint8), mask=byte < B)


def launch(codes: Tensor, bits: int) -> Tensor:
    """``pack_bits.reference`` by one kernel. Codes that are not contiguous are copied first."""
    packed = declaration._fake(codes, bits)
    if packed.numel() == 0:
        return packed
    codes = codes.contiguous()
    K, B = codes.shape[-1], packed.shape[-1]
    if K * bits == B * 8:
        K, B = codes.numel(), packed.numel()
    rows = packed.numel() // B
    _pack_bits_kernel[(rows * triton.cdiv(B, BLOCK),)](codes, packed, K, B, BITS=bits, BLOCK=BLOCK)
    return packed


def builds() -> list[Build]:
    types = {"codes_ptr": "*u8", "packed_ptr": "*u8", "K": "i32", "B": "i32"}
    return [
        Build(
            f"{bits} bits{'' if aligned else ', odd rows'}",
            _pack_bits_kernel,
            types,
            {"BITS": bits, "BLOCK": BLOCK},
            divisible_by_16=("codes_ptr", "packed_ptr", "K", "B") if aligned else ("codes_ptr", "packed_ptr"),
            options={"num_warps": 4},
        )
        for bits, aligned in ((1, True), (2, True), (4, True), (4, False))
    ]
