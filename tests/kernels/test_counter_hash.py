"""The hash against its equations in Python integers, and its statistics."""

from __future__ import annotations

import math

import pytest
import torch
from qtrain_kernels.counter_hash import mix, random_bits, random_signs, stream_id, uniform
from torch import Tensor

WORD = 2**32


def mix_int(x: int, second_key: int = 0) -> int:
    x ^= x >> 16
    x = (x * 0x7FEB352D + second_key) % WORD
    x ^= x >> 15
    x = x * 0x846CA68B % WORD
    return x ^ (x >> 16)


def bits_int(seed: int, step: int, stream: int, row: int, column: int) -> int:
    """One element, every operation on non-negative integers modulo 2^32."""
    low, high = seed % WORD, (seed >> 32) % WORD
    keys = []
    for start in (0x243F6A88, 0x85A308D3):
        word = mix_int(low ^ start)
        word = mix_int((word + high) % WORD)
        word = mix_int(word ^ (step % WORD))
        keys.append(mix_int((word + stream) % WORD))
    r0 = mix_int((row % WORD) ^ keys[0])
    r1 = mix_int((row + keys[1]) % WORD)
    return mix_int((column * 0x9E3779B9 % WORD) ^ r0, r1)


def scalar(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


def bits(seed=1, step=2, stream=3, rows=4, columns=5, row_offset=0) -> Tensor:
    return random_bits(scalar(seed), scalar(step), stream, rows, columns, row_offset)


def bit_table(x: Tensor) -> Tensor:
    """int32 [...] -> float64 [..., 32] of 0 and 1."""
    return ((x[..., None] >> torch.arange(32)) & 1).double()


@pytest.mark.parametrize(
    ("seed", "step", "stream", "row_offset"),
    [
        (0, 0, 0, 0),
        (1234, 17, 99, 5),
        (-5, 2**33 + 3, -(2**31), 2**31 - 2),
        (2**62 + 11, 2**31, 2**31 - 1, 2**40 + 5),
        (-(2**63), -1, -1, 2**32 - 1),
    ],
)
def test_equals_the_equations_in_python_integers(seed, step, stream, row_offset):
    got = bits(seed, step, stream, 5, 37, row_offset)
    want = [[bits_int(seed, step, stream, row_offset + r, c) for c in range(37)] for r in range(5)]
    assert [[v % WORD for v in row] for row in got.tolist()] == want


def test_the_first_word_is_pinned():
    """Changing the hash changes every resumed run: this number may change with a format version only."""
    assert bits().tolist()[0][0] % WORD == bits_int(1, 2, 3, 0, 0) == FIRST_WORD


FIRST_WORD = 0xA0646D7D


def test_mix_is_a_bijection_on_a_sample():
    x = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    assert mix(x).unique().numel() == x.unique().numel()


def test_row_offset_splits_the_whole():
    whole = bits(rows=11, row_offset=2**31 - 4)
    parts = [bits(rows=n, row_offset=scalar(2**31 - 4 + start)) for start, n in ((0, 3), (3, 1), (4, 7))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(bits(rows=3, row_offset=1), bits(rows=3))


N_ROWS, N_COLUMNS = 256, 1024
N = N_ROWS * N_COLUMNS


@pytest.mark.parametrize(
    "change", [{"seed": 7}, {"seed": 1 + 2**32}, {"step": 3}, {"stream": 4}, {"row_offset": N_ROWS}], ids=str
)
def test_another_name_gives_independent_bits(change):
    """Each of the 32 bits agrees in half of N elements: binomial, 6 sigma; false alarm < 32 * 2e-9."""
    a = bits(rows=N_ROWS, columns=N_COLUMNS)
    b = bits(**({"rows": N_ROWS, "columns": N_COLUMNS} | change))
    agree = 1 - bit_table(a ^ b).mean(dim=(0, 1))
    assert (agree - 0.5).abs().max() < 6 * 0.5 / math.sqrt(N)


def test_avalanche():
    """Flipping one input bit flips each output bit with p = 1/2.

    4096 samples a cell: sigma = 1/128. Six sigma over 32 * 32 cells for each input: false alarm < 1e-5.
    """
    samples = 4096
    x = torch.randint(-(2**31), 2**31, (samples,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    for i in range(32):
        flipped = bit_table(mix(x) ^ mix(x ^ torch.tensor(1 << i).to(torch.int32))).mean(dim=0)
        assert (flipped - 0.5).abs().max() < 6 * 0.5 / math.sqrt(samples), f"mix, input bit {i}"
    for i in range(12):  # row and step, as they occur: small integers that differ in one bit
        for name in ("row_offset", "step"):
            a, b = (
                bits(rows=1, columns=samples),
                bits(rows=1, columns=samples, **{name: (2 if name == "step" else 0) ^ 1 << i}),
            )
            flipped = bit_table(a ^ b).mean(dim=(0, 1))
            assert (flipped - 0.5).abs().max() < 6 * 0.5 / math.sqrt(samples), f"{name}, bit {i}"


def test_uniform_moments_and_histogram():
    """Mean, variance and a 256-bin chi-square of N uniforms, each within six sigma of its law."""
    u = uniform(bits(rows=N_ROWS, columns=N_COLUMNS)).double()
    assert u.min() >= 0
    assert u.max() <= 1 - 2**-24
    assert torch.equal(u * 2**24, (u * 2**24).round()), "uniforms are multiples of 2^-24"
    assert abs(u.mean() - 0.5) < 6 * math.sqrt(1 / 12 / N)
    assert abs(u.var() - 1 / 12) < 6 * math.sqrt(1 / 180 / N)  # Var[(u - 1/2)^2] = 1/80 - 1/144 = 1/180
    counts = torch.histc(u.float(), bins=256, min=0, max=1).double()
    chi_square = ((counts - N / 256) ** 2 / (N / 256)).sum()
    assert abs(chi_square - 255) < 6 * math.sqrt(2 * 255)


@pytest.mark.parametrize("lag", [(0, 1), (0, 2), (0, 64), (1, 0), (16, 0), (1, 1), (1, -1)], ids=str)
def test_neighbours_are_uncorrelated(lag):
    u = uniform(bits(rows=N_ROWS, columns=N_COLUMNS)).double() - 0.5
    rows, columns = lag
    a = u[rows:, max(columns, 0) : N_COLUMNS + min(columns, 0)]
    b = u[: N_ROWS - rows, max(-columns, 0) : N_COLUMNS - max(columns, 0)]
    correlation = (a * b).mean() * 12
    assert abs(correlation) < 6 / math.sqrt(a.numel())


def test_signs_and_stream_ids():
    signs = random_signs(scalar(1), scalar(2), 3, 4096)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 6 / math.sqrt(4096)
    assert stream_id("blocks.3.mlp.up/wgrad.grad_output") != stream_id("blocks.3.mlp.up/wgrad.input")
    assert -(2**31) <= stream_id("x") < 2**31
