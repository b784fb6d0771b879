"""unpack_bits: the inverse of ``pack_bits``: codes[..., P j + i] = (bytes[..., j] >> (bits i)) mod 2^bits, P = 8 / bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qtrain_kernels import pack_bits
from qtrain_kernels.op import Workload, define_op


def check(packed: Tensor, bits: int, count: int) -> None:
    """Raise ValueError for arguments outside the op's domain; shapes and dtypes only, no data is read."""
    pack_bits.check(packed, bits)
    needed = (count * bits + 7) // 8
    if count < 0 or packed.shape[-1] != needed:
        raise ValueError(
            f"{count} codes of {bits} bits fill {needed} bytes a row, but packed is {list(packed.shape)}"
        )


def reference(packed: Tensor, bits: int, count: int) -> Tensor:
    """-> codes [..., count] uint8, contiguous.

    ``packed`` [..., B] uint8 of ``pack_bits``, any strides; ``bits``: 1, 2 or 4; ``count``: codes a row, B = ceil(count bits / 8).
    Raises ValueError, see ``check``.
    """
    check(packed, bits, count)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(-2)[..., :count].clone(memory_format=torch.contiguous_format)


def _fake(packed: Tensor, bits: int, count: int) -> Tensor:
    check(packed, bits, count)
    return packed.new_empty((*packed.shape[:-1], count))


Inputs = tuple[Tensor, int, int]


def _cases() -> dict[str, Callable[[], Inputs]]:
    def case(make: Callable[[], Tensor], bits: int, missing: int) -> Callable[[], Inputs]:
        def inputs() -> Inputs:
            packed = make()
            return packed, bits, max(0, packed.shape[-1] * 8 // bits - missing)

        return inputs

    return {
        f"{name}/{bits}/{missing}": case(make, bits, missing)
        for i, (name, make) in enumerate(pack_bits._TENSORS.items())
        for bits in pack_bits.BITS
        for missing in (((i + bits) % 2) * (8 // bits - 1),)
    }


def _workloads(device: str) -> Sequence[Workload]:
    def workload(R: int, K: int, bits: int) -> Workload:
        return Workload(
            f"{R}x{K}/{bits}",
            lambda on: (pack_bits._bytes(R, K * bits // 8).to(on), bits, K),
            bytes=R * K + R * K * bits // 8,
        )

    shapes = [(4096, 768)] if device == "cpu" else [(15872, 4096), (15872, 16384), (16384, 768)]
    return [workload(*shape, bits) for shape in shapes for bits in (2, 4)]


unpack_bits = define_op(
    "unpack_bits",
    reference,
    fake=_fake,
    cases=_cases(),
    workloads=_workloads,
    cuda="qtrain_kernels.unpack_bits_triton:launch",
)
