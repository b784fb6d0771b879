"""unpack_bits against numpy's unpackbits, and as the inverse of pack_bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qtrain_kernels import unpack_bits as declaration
from qtrain_kernels.pack_bits import pack_bits
from qtrain_kernels.unpack_bits import unpack_bits
from torch import Tensor

from qtrain.quant.packing import unpack


def oracle(packed: Tensor, bits: int, count: int) -> list[np.ndarray]:
    """Bit by bit, with numpy's own unpacking of bits."""
    values = np.array(packed.tolist(), dtype=np.uint8).reshape(packed.shape)
    single = np.unpackbits(values, axis=-1, bitorder="little")[..., : count * bits].astype(np.int64)
    codes = (single.reshape(*packed.shape[:-1], count, bits) * 2 ** np.arange(bits)).sum(axis=-1)
    return [codes.astype(np.uint8)]


@pytest.mark.parametrize("name", list(unpack_bits.cases))
def test_the_layout_is_that_of_packed_tensors(name: str) -> None:
    packed, bits, count = unpack_bits.cases[name]()
    assert torch.equal(unpack_bits(packed, bits, count), unpack(packed, bits, count))


@pytest.mark.parametrize("name", [name for name in pack_bits.cases if "too_large" not in name])
def test_it_inverts_pack_bits(name: str) -> None:
    codes, bits = pack_bits.cases[name]()
    assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, codes.shape[-1]), codes)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    packed = torch.randint(0, 256, (2**30 // 2048 + 2, 2048), dtype=torch.uint8, device="cuda")
    for count in (4096, 4095):
        assert torch.equal(unpack_bits(packed, 4, count)[-1], unpack_bits(packed[-1], 4, count))


@pytest.mark.parametrize(
    ("packed", "bits", "count", "message"),
    [
        (torch.zeros(3, dtype=torch.uint8), 8, 3, "bits=8: allowed are 1, 2, 4"),
        (
            torch.zeros(3, dtype=torch.uint8),
            4,
            7,
            r"7 codes of 4 bits fill 4 bytes a row, but packed is \[3\]",
        ),
        (torch.zeros(3, dtype=torch.uint8), 4, 4, "fill 2 bytes a row"),
        (torch.zeros(0, dtype=torch.uint8), 4, -1, "-1 codes"),
        (torch.zeros(3, dtype=torch.int32), 4, 6, "torch.int32"),
    ],
)
def test_bad_arguments_are_named(packed: Tensor, bits: int, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        declaration.reference(packed, bits, count)
