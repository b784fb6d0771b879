"""The Triton kernel of ``unpack_bits``: a program unpacks BLOCK bytes of one row; rows of whole bytes are one long row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qtrain_kernels import unpack_bits as declaration
from qtrain_kernels.aot import Build
from qtrain_kernels.pack_bits_triton import BLOCK


@triton.jit
def _unpack_bits_kernel(packed_ptr, codes_ptr, K, B, BITS: tl.constexpr, BLOCK: tl.constexpr):
    along = tl.cdiv(B, BLOCK)
    row = (tl.program_id(0) // along).to(tl.int64)
    byte = (tl.program_id(0) % along).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.expand_dims(tl.arange(0, 8 // BITS), 0)  # [1, P]
    packed = tl.load(packed_ptr + row * B + byte, mask=byte < B, other=0).to(tl.int32)
    codes = (tl.expand_dims(packed, 1) >> (place * BITS)) & ((1 << BITS) - 1)
    index = tl.expand_dims(byte, 1) * (8 // BITS) + place
    tl.store(codes_ptr + row * K + index, codes.to(tl.uint8), mask=index < K)


def launch(packed: Tensor, bits: int, count: int) -> Tensor:
    """``unpack_bits.reference`` by one kernel. Bytes that are not contiguous are copied first."""
    codes = declaration._fake(packed, bits, count)
    if codes.numel() == 0:
        return codes
    packed = packed.contiguous()
    K, B = count, packed.shape[-1]
    if K * bits == B * 8:
        K, B = codes.numel(), packed.numel()
    rows = packed.numel() // B
    _unpack_bits_kernel[(rows * triton.cdiv(B, BLOCK),)](packed, codes, K, B, BITS=bits, BLOCK=BLOCK)
    return codes


def builds() -> list[Build]:
    types = {"packed_ptr": "*u8", "codes_ptr": "*u8", "K": "i32", "B": "i32"}
    return [
        Build(
            f"{bits} bits{'' if aligned else ', odd rows'}",
            _unpack_bits_kernel,
            types,
            {"BITS": bits, "BLOCK": BLOCK},
            divisible_by_16=("codes_ptr", "packed_ptr", "K", "B") if aligned else ("codes_ptr", "packed_ptr"),
            options={"num_warps": 4},
        )
        for bits, aligned in ((1, True), (2, True), (4, True), (4, False))
    ]
