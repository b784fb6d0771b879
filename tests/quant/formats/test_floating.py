"""Small floats against torch's own float8 casts, Python fractions and the tables of the standards."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.quant.formats.floating import E2M1, E2M3, E3M2, E3M4, E4M3, E5M2, FloatFormat

PROFILE = settings(deadline=None, derandomize=True, max_examples=50)
INF, NAN = float("inf"), float("nan")
GRIDS = [E4M3, E5M2, E2M1, E3M4, E3M2, E2M3]
CASTS = [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)]


def by_name(grid: object) -> str:
    return getattr(grid, "name", str(grid))


def value_of(code: int, grid: FloatFormat) -> Fraction:
    """A code's magnitude from the definition: fraction * 2^(1 - bias), or (1 + fraction) * 2^(exponent - bias)."""
    exponent, fraction = divmod(code % 2 ** (grid.bits - 1), 2**grid.mantissa)
    significand = Fraction(fraction, 2**grid.mantissa) + (1 if exponent else 0)
    return significand * Fraction(2) ** (max(exponent, 1) - grid.bias)


@cache
def magnitudes(grid: FloatFormat) -> list[Fraction]:
    """Codes of the sign bit 0 that are numbers: 448 and 57344 are the last ones of the fp8 formats."""
    return [value for c in range(2 ** (grid.bits - 1)) if (value := value_of(c, grid)) <= grid.max]


def nearest_even(v: float, grid: FloatFormat) -> float:
    """The nearest grid value, ties to the even code (the even mantissa), beyond the end the end.

    In Python's float64, where distances of float32 numbers near the grid are exact.
    """
    x = min(abs(v), grid.max)
    values = [float(value) for value in magnitudes(grid)]
    code = min(range(len(values)), key=lambda c: (abs(values[c] - x), c % 2))
    return values[code] * (-1 if v < 0 else 1)


def test_the_constants():
    rows = [(g.name, g.bits, g.min, g.max, g.widest_gap, g.levels().numel(), g.exact_in_bf16) for g in GRIDS]
    assert rows == [
        ("e4m3", 8, -448.0, 448.0, 32.0, 253, True),  # 256 codes less two NaN and one of the two zeros
        ("e5m2", 8, -57344.0, 57344.0, 8192.0, 247, True),  # less six NaN, two infinities, one zero
        ("e2m1", 4, -6.0, 6.0, 2.0, 15, True),
        ("e3m4", 8, -15.5, 15.5, 0.5, 223, True),  # less 30 NaN, two infinities, one zero
        ("e3m2", 6, -28.0, 28.0, 4.0, 63, True),
        ("e2m3", 6, -7.5, 7.5, 0.5, 63, True),
    ]
    assert [(g.exponent, g.mantissa, g.bias) for g in GRIDS] == [
        (4, 3, 7),
        (5, 2, 15),
        (2, 1, 1),
        (3, 4, 3),
        (3, 2, 3),
        (2, 3, 1),
    ]
    assert len(set(GRIDS)) == 6


def test_e2m1_is_the_grid_of_the_mx_standard():
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert E2M1.levels().tolist() == sorted({*positive, *(-p for p in positive)})
    assert E2M1.decode(torch.arange(8, dtype=torch.uint8)).tolist() == positive
    assert E2M1.decode(torch.arange(8, 16, dtype=torch.uint8)).tolist() == [-p for p in positive]


@pytest.mark.parametrize(("grid", "dtype"), CASTS, ids=by_name)
def test_all_codes_have_the_values_of_the_hardware_type(grid, dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    hardware = codes.view(dtype).to(torch.float32)
    decoded = grid.decode(codes)
    assert decoded.dtype == torch.float32
    numbers = hardware.isfinite()
    assert torch.equal(decoded.isfinite(), numbers)
    assert bool(decoded[~numbers].isnan().all())
    # bit patterns, so that -0 is told from 0
    assert torch.equal(decoded[numbers].view(torch.int32), hardware[numbers].view(torch.int32))
    assert torch.equal(grid.encode(decoded[numbers]), codes[numbers])


@pytest.mark.parametrize("grid", GRIDS, ids=by_name)
def test_decode_follows_the_definition_and_encode_inverts_it(grid):
    codes = torch.arange(2**grid.bits, dtype=torch.uint8)
    for code, value in zip(codes.tolist(), grid.decode(codes).tolist(), strict=True):
        want = value_of(code, grid)
        if want <= grid.max:
            assert Fraction(abs(value)) == want
            assert (torch.signbit(torch.tensor(value)).item()) == (code >= 2 ** (grid.bits - 1))
            assert grid.encode(torch.tensor([value])).tolist() == [code]
    assert grid.encode(torch.zeros(2, 3)).shape == (2, 3)
    assert grid.encode(torch.zeros(1)).dtype == torch.uint8


@pytest.mark.parametrize(("grid", "dtype"), CASTS, ids=by_name)
def test_nearest_equals_the_cast_of_torch(grid, dtype):
    """On all bfloat16 numbers of magnitude up to the largest, subnormals of the grid and of float32 included."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    v = bits.view(torch.bfloat16).to(torch.float32)
    v = v[v.abs() <= grid.max]
    want = v.to(dtype).to(torch.float32)
    assert torch.equal(grid.round(v), want)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(50_000, generator=generator) * torch.tensor(2.0).pow(
        torch.randint(-20, 8, (50_000,), generator=generator)
    )
    v = v.clamp(-grid.max, grid.max)
    assert torch.equal(grid.round(v), v.to(dtype).to(torch.float32))


@pytest.mark.parametrize("grid", GRIDS, ids=by_name)
def test_around_every_midpoint(grid):
    levels = grid.levels()
    middle = (levels[1:] + levels[:-1]) / 2
    assert torch.equal(grid.round(torch.nextafter(middle, torch.full_like(middle, INF))), levels[1:])
    assert torch.equal(grid.round(torch.nextafter(middle, torch.full_like(middle, -INF))), levels[:-1])
    assert grid.round(middle).tolist() == [nearest_even(v, grid) for v in middle.tolist()]
    assert torch.equal(grid.round(levels), levels)


@pytest.mark.parametrize("grid", GRIDS, ids=by_name)
def test_saturates_and_keeps_nan(grid):
    beyond = torch.tensor([grid.max * (1 + 2.0**-20), grid.max * 1.07, grid.max * 1.5, 1e30, 3e38, INF])
    for noise in (None, torch.zeros(6), torch.full((6,), 1 - 2.0**-24)):
        assert grid.round(beyond, noise).tolist() == [grid.max] * 6
        assert grid.round(-beyond, noise).tolist() == [-grid.max] * 6
        assert grid.round(torch.full((6,), NAN), noise).isnan().all()
    assert grid.encode(torch.tensor([NAN, 0.0])).tolist() == [0, 0]


@pytest.mark.parametrize("grid", GRIDS, ids=by_name)
def test_tiny_numbers(grid):
    smallest = float(magnitudes(grid)[1])
    v = torch.tensor([0.0, -0.0, 1e-45, -1e-40, smallest / 2, smallest * 0.50001, smallest * 0.7])
    rounded = grid.round(v)
    assert rounded.tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, smallest, smallest]
    assert torch.signbit(rounded).tolist() == [False, True, False, True, False, False, False]


@PROFILE
@given(v=st.floats(-70000, 70000, width=32), w=st.floats(-70000, 70000, width=32))
@pytest.mark.parametrize("grid", GRIDS, ids=by_name)
def test_nearest_against_fractions(grid, v, w):
    """Also with magnitudes spread over the exponents of the grid; monotone and idempotent."""
    for scale in (1.0, 2.0**-8, 2.0**-14):
        x = torch.tensor(sorted([v * scale, w * scale]), dtype=torch.float32)
        rounded = grid.round(x)
        assert rounded.tolist() == [nearest_even(a, grid) for a in x.tolist()]
        assert rounded[0] <= rounded[1]
        assert torch.equal(grid.round(rounded), rounded)


@pytest.mark.parametrize("grid", GRIDS, ids=by_name)
def test_stochastic_share_is_the_fraction(grid):
    """Between every two neighbours: over the noise i/64 the share rounded up is the place between them."""
    levels = grid.levels()
    noise = (torch.arange(64) / 64)[:, None]
    low, high = levels[:-1], levels[1:]
    for numerator in (0, 1, 16, 32, 63):
        v = low + (high - low) * (numerator / 64)
        rounded = grid.round(v.expand(64, -1).contiguous(), noise.expand(64, len(v)).contiguous())
        up = rounded == high
        assert bool((up | (rounded == low)).all())
        assert bool((up.sum(0) == numerator).all())


@pytest.mark.parametrize("grid", GRIDS, ids=by_name)
def test_stochastic_rounding_is_unbiased(grid):
    """The error of each draw is at most one widest step; five sigma of the mean of n draws, per magnitude."""
    generator = torch.Generator().manual_seed(1)
    n = 100_000
    for magnitude in (grid.max, 1.0, float(magnitudes(grid)[1]) * 3):
        v = (torch.rand(n, generator=generator) * 2 - 1) * magnitude
        error = (grid.round(v, torch.rand(n, generator=generator)) - v).to(torch.float64)
        assert error.abs().max() > 0
        assert abs(error.mean().item()) < 5 * error.std().item() / n**0.5


def test_no_unsigned_counterpart():
    for grid in GRIDS:
        with pytest.raises(ValueError, match=rf"format '{grid.name}' has no unsigned counterpart"):
            grid.unsigned()


def test_rounds_views_and_keeps_shapes():
    v = torch.randn(6, 8, generator=torch.Generator().manual_seed(2)) * 3
    assert torch.equal(E4M3.round(v.t()), E4M3.round(v.t().contiguous()))
    assert torch.equal(E2M1.round(v[::2, ::3]), E2M1.round(v[::2, ::3].contiguous()))
