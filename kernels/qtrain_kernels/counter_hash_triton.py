"""The Triton twin of ``counter_hash``: the same equations on uint32, bit-equal by test.

A kernel calls ``key`` once a program, ``row_keys`` once a row and ``random_bits`` once an element, so the bits
are made in registers and never stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qtrain_kernels import counter_hash

GOLDEN = tl.constexpr(counter_hash.GOLDEN)
MULTIPLIER_1 = tl.constexpr(counter_hash.MULTIPLIER_1)
MULTIPLIER_2 = tl.constexpr(counter_hash.MULTIPLIER_2)
KEY_0 = tl.constexpr(counter_hash.KEY_0)
KEY_1 = tl.constexpr(counter_hash.KEY_1)


@triton.jit
def mix(x, second_key):
    x = x ^ (x >> 16)
    x = x * MULTIPLIER_1 + second_key
    x = x ^ (x >> 15)
    x = x * MULTIPLIER_2
    return x ^ (x >> 16)


@triton.jit
def _key_word(start, low, high, step, stream):
    zero = low ^ low
    word = mix(low ^ start, zero)
    word = mix(word + high, zero)
    word = mix(word ^ step, zero)
    return mix(word + stream, zero)


@triton.jit
def key(seed, step, stream):
    """(k0, k1) uint32 scalars from int64 scalars ``seed`` and ``step`` and the int32 scalar ``stream``."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    step, stream = step.to(tl.uint32), stream.to(tl.uint32)
    return _key_word(KEY_0, low, high, step, stream), _key_word(KEY_1, low, high, step, stream)


@triton.jit
def row_keys(row, k0, k1):
    """(r0, r1) uint32 for int64 global row indices ``row``."""
    row = row.to(tl.uint32)
    return mix(row ^ k0, row ^ row), mix(row + k1, row ^ row)


@triton.jit
def random_bits(column, r0, r1):
    """uint32, broadcast over integer ``column`` and the row's keys.

    ``mix`` of column * GOLDEN ^ r0: its first step, x ^ x >> 16, is linear in xor and so is taken of each of the two,
    once a column and once a row."""
    column = column.to(tl.uint32) * GOLDEN
    x = (column ^ (column >> 16)) ^ (r0 ^ (r0 >> 16))
    x = x * MULTIPLIER_1 + r1
    x = x ^ (x >> 15)
    x = x * MULTIPLIER_2
    return x ^ (x >> 16)


@triton.jit
def uniform(bits):
    """The top 24 bits as float32 in [0, 1 - 2^-24]."""
    return (bits & 0xFFFFFF00).to(tl.float32) * 2.3283064365386963e-10  # 2^-32; 24 bits convert exactly
