"""Codes and the bytes that hold them, against a long number written by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.quant import pack, unpack

PROFILE = settings(deadline=None, derandomize=True, max_examples=60)


def packed_by_hand(codes: list[int], bits: int) -> list[int]:
    """One long little-endian number, cut into bytes, with as many bytes as whole units of codes fill."""
    unit_codes = 8 // math.gcd(8, bits)
    units = -(-len(codes) // unit_codes)
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    return list(number.to_bytes(units * unit_codes * bits // 8, "little"))


@PROFILE
@given(data=st.data(), bits=st.integers(1, 8), count=st.integers(0, 35), rows=st.integers(1, 3))
def test_pack(data, bits, count, rows):
    codes = data.draw(
        st.lists(
            st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count),
            min_size=rows,
            max_size=rows,
        )
    )
    tensor = torch.tensor(codes, dtype=torch.uint8).reshape(rows, count)
    packed = pack(tensor, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [packed_by_hand(row, bits) for row in codes]
    back = unpack(packed, bits, count)
    assert back.dtype == torch.uint8
    assert torch.equal(back, tensor)
    assert torch.equal(unpack(pack(tensor[0], bits), bits, count), tensor[0])
    assert torch.equal(pack(tensor[None], bits)[0], packed)


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_all_codes(bits):
    codes = torch.arange(2**bits, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.tolist() == packed_by_hand(codes.tolist(), bits)
    assert packed.numel() == max(2**bits * bits // 8, 1)  # two codes of one bit fill a byte
    assert torch.equal(unpack(packed, bits, 2**bits), codes)
    assert pack(codes.flip(0).contiguous(), bits).is_contiguous()


def test_eight_bits_are_not_copied():
    codes = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    assert pack(codes, 8).data_ptr() == codes.data_ptr()
    assert unpack(codes, 8, 4).data_ptr() == codes.data_ptr()
    assert pack(codes.t(), 8).is_contiguous()
