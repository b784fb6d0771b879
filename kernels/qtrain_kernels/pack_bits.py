"""pack_bits: codes of 1, 2 or 4 bits, side by side in bytes.

    bytes[..., j] = sum_i codes[..., P j + i] << (bits i)        P = 8 / bits codes a byte, the first in the lowest bits

Each row (the last axis) by itself, filled up with zeros to whole bytes, so that rows can be cut apart. It is the layout of
packed tensors everywhere in qtrain. ``unpack_bits`` is the inverse.

K codes a row, B = ceil(K / P) bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qtrain_kernels.op import Workload, define_op

BITS = (1, 2, 4)


def check(codes: Tensor, bits: int) -> None:
    """Raise ValueError for arguments outside the op's domain; shapes and dtypes only, no data is read."""
    if bits not in BITS:
        raise ValueError(f"bits={bits}: allowed are {', '.join(map(str, BITS))}")
    if codes.dim() == 0 or codes.dtype != torch.uint8:
        raise ValueError(f"codes must be [..., K] uint8, not {list(codes.shape)} {codes.dtype}")


def reference(codes: Tensor, bits: int) -> Tensor:
    """-> bytes [..., B] uint8, contiguous.

    ``codes`` [..., K] uint8 below 2^bits (of larger ones the low bits are taken), any strides; ``bits``: 1, 2 or 4. Raises
    ValueError, see ``check``.
    """
    check(codes, bits)
    per_byte = 8 // bits
    codes = torch.nn.functional.pad(codes & (2**bits - 1), (0, -codes.shape[-1] % per_byte))
    units = codes.unflatten(-1, (codes.shape[-1] // per_byte, per_byte))
    packed = units[..., 0].clone(memory_format=torch.contiguous_format)
    for i in range(1, per_byte):
        packed |= units[..., i] << (bits * i)
    return packed


def _fake(codes: Tensor, bits: int) -> Tensor:
    check(codes, bits)
    per_byte = 8 // bits
    return codes.new_empty((*codes.shape[:-1], (codes.shape[-1] + per_byte - 1) // per_byte))


def _bytes(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def _case(make: Callable[[], Tensor], bits: int) -> Callable[[], tuple[Tensor, int]]:
    return lambda: (make() % 2**bits, bits)


_TENSORS: dict[str, Callable[[], Tensor]] = {
    "one": lambda: _bytes(1),
    "row": lambda: _bytes(1000),
    "odd_row": lambda: _bytes(1003),
    "matrix": lambda: _bytes(5, 64),
    "odd_matrix": lambda: _bytes(7, 33),
    "short_rows": lambda: _bytes(300, 3),
    "many_blocks": lambda: _bytes(3, 9001),
    "four_axes": lambda: _bytes(2, 3, 4, 21),
    "transposed": lambda: _bytes(40, 9).t(),
    "strided": lambda: _bytes(12, 66)[1::2, ::3],
    "expanded": lambda: _bytes(1, 21).expand(6, 21),
    "no_rows": lambda: _bytes(0, 8),
    "no_columns": lambda: _bytes(3, 0),
}


def _workloads(device: str) -> Sequence[Workload]:
    def workload(R: int, K: int, bits: int) -> Workload:
        return Workload(
            f"{R}x{K}/{bits}",
            lambda on: (_bytes(R, K).to(on) % 2**bits, bits),
            bytes=R * K + R * K * bits // 8,
        )

    shapes = [(4096, 768)] if device == "cpu" else [(15872, 4096), (15872, 16384), (16384, 768)]
    return [workload(*shape, bits) for shape in shapes for bits in (2, 4)]


pack_bits = define_op(
    "pack_bits",
    reference,
    fake=_fake,
    cases={f"{name}/{bits}": _case(make, bits) for name, make in _TENSORS.items() for bits in BITS}
    | {"too_large/4": lambda: (_bytes(9, 50), 4), "too_large/1": lambda: (_bytes(9, 50), 1)},
    workloads=_workloads,
    cuda="qtrain_kernels.pack_bits_triton:launch",
)
