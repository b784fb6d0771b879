"""Random bits without state: a counter-based hash of (seed, step, stream, row, column).

A generator with state gives other bits when activation checkpointing recomputes a layer, when a run resumes
or when the world size changes, and a ``torch.Generator`` cannot be traced by a fullgraph compile. Here every
element of every quantized operand owns its bits by name:

    (k0, k1)   = key(seed, step, stream)             stream: which layer, GEMM and operand
    (r0, r1)   = (mix(row ^ k0), mix(row + k1))      row: global row index (for activations: token in the step)
    bits       = mix'(column * GOLDEN ^ r0; r1)      32 bits

``mix`` is the 32-bit finaliser "lowbias32" (multipliers found by Chris Wellons' hash prospector, public
domain); ``mix'`` adds the second row key between its two multiplications, so that two rows repeat each other's
bits only if both of their 32-bit keys agree. All arithmetic is modulo 2^32, written on int32 tensors (torch
has no uint32 multiplication) with the arithmetic right shift masked into a logical one. The Triton twin,
``counter_hash_triton``, is bit-equal by test.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

GOLDEN = 0x9E3779B9  # 2^32 / golden ratio, odd: column -> column * GOLDEN permutes the 32-bit integers
MULTIPLIER_1 = 0x7FEB352D
MULTIPLIER_2 = 0x846CA68B
KEY_0 = 0x243F6A88  # the first two words of pi's fraction: start values that nobody chose
KEY_1 = 0x85A308D3


def _signed(value: int) -> int:
    """The int32 that has the bits of the unsigned 32-bit ``value``."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def _shift_right(x: Tensor, n: int) -> Tensor:
    return (x >> n) & ((1 << (32 - n)) - 1)


def mix(x: Tensor, second_key: Tensor | int = 0) -> Tensor:
    """int32 -> int32, a bijection for each ``second_key``; every input bit flips each output bit with p ~ 1/2."""
    x = x ^ _shift_right(x, 16)
    x = x * MULTIPLIER_1 + second_key
    x = x ^ _shift_right(x, 15)
    x = x * _signed(MULTIPLIER_2)
    return x ^ _shift_right(x, 16)


def stream_id(name: str) -> int:
    """A stable 32-bit id for a named stream such as ``"blocks.3.mlp.up/wgrad.grad_output"``."""
    return _signed(zlib.crc32(name.encode()))


def key(seed: Tensor, step: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """Two 0-d int32 key words from 0-d integer tensors ``seed`` and ``step`` and the stream's id."""
    low, high = seed.to(torch.int32), (seed >> 31 >> 1).to(torch.int32)
    step = step.to(torch.int32)
    words = []
    for start in (KEY_0, KEY_1):
        word = mix(low ^ _signed(start))
        word = mix(word + high)
        word = mix(word ^ step)
        words.append(mix(word + stream))
    return words[0], words[1]


def random_bits(
    seed: Tensor, step: Tensor, stream: int, rows: int, columns: int, row_offset: Tensor | int = 0
) -> Tensor:
    """``[rows, columns]`` int32, 32 uniform bits an element.

    ``row_offset``: global index of the first row (int or 0-d integer tensor). Splitting the rows over
    micro-batches or processes, each with its own offset, gives the bits of the whole.
    """
    k0, k1 = key(seed, step, stream)
    row = (torch.arange(rows, device=seed.device, dtype=torch.int64) + row_offset).to(torch.int32)
    column = torch.arange(columns, device=seed.device, dtype=torch.int32) * _signed(GOLDEN)
    r0, r1 = mix(row ^ k0), mix(row + k1)
    return mix(column ^ r0[:, None], r1[:, None])


def uniform(bits: Tensor) -> Tensor:
    """The top 24 of 32 bits as float32 in [0, 1 - 2^-24], each value exactly representable."""
    return _shift_right(bits, 8).to(torch.float32) * 2.0**-24


def random_signs(seed: Tensor, step: Tensor, stream: int, columns: int) -> Tensor:
    """``[columns]`` float32 of +-1, from the top bit of row 0."""
    bits = random_bits(seed, step, stream, 1, columns)[0]
    return torch.where(bits < 0, -1.0, 1.0)
