"""pack_bits against numpy's packbits, and its layout against ``qtrain.quant.packing``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qtrain_kernels import pack_bits as declaration
from qtrain_kernels.pack_bits import pack_bits
from torch import Tensor

from qtrain.quant.packing import pack


def oracle(codes: Tensor, bits: int) -> list[np.ndarray]:
    """Bit by bit: the low bits of each code, lowest first, then numpy's own packing of bits."""
    values = np.array(codes.tolist(), dtype=np.int64).reshape(codes.shape)
    single = (values[..., None] // 2 ** np.arange(bits)) % 2
    single = single.reshape(*codes.shape[:-1], codes.shape[-1] * bits).astype(np.uint8)
    return [np.packbits(single, axis=-1, bitorder="little")]


@pytest.mark.parametrize("name", list(pack_bits.cases))
def test_the_layout_is_that_of_packed_tensors(name: str) -> None:
    codes, bits = pack_bits.cases[name]()
    codes = codes % 2**bits
    assert torch.equal(pack_bits(codes, bits), pack(codes, bits))


def test_the_first_code_is_in_the_lowest_bits() -> None:
    assert pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]
    assert pack_bits(torch.tensor([1, 2, 3, 0, 2], dtype=torch.uint8), 2).tolist() == [0b00111001, 0b10]


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    codes = torch.randint(0, 16, (2**31 // 4095 + 2, 4095), dtype=torch.uint8, device="cuda")
    assert torch.equal(pack_bits(codes, 4)[-1], pack_bits(codes[-1], 4))
    codes = codes[:, :4094].contiguous().flatten()[: 2**31 + 2 * 4094]
    assert torch.equal(pack_bits(codes, 4)[-2047:], pack_bits(codes[-4094:], 4))


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.zeros(3, dtype=torch.uint8), 3, "bits=3: allowed are 1, 2, 4"),
        (torch.zeros(3, dtype=torch.int8), 4, r"codes must be \[..., K\] uint8, not \[3\] torch.int8"),
        (torch.zeros((), dtype=torch.uint8), 4, r"not \[\] torch.uint8"),
    ],
)
def test_bad_arguments_are_named(codes: Tensor, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        declaration.reference(codes, bits)
