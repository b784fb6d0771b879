"""Integer grids against plain Python integers and fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.quant.formats import IntegerFormat, MidriseFormat

PROFILE = settings(deadline=None, derandomize=True, max_examples=60)
INF, NAN = float("inf"), float("nan")

INTEGERS = [IntegerFormat(b) for b in range(2, 9)] + [IntegerFormat(b, signed=False) for b in range(1, 9)]
MIDRISES = [MidriseFormat(b) for b in range(1, 9)]
GRIDS = INTEGERS + MIDRISES


def by_name(grid: object) -> str:
    return grid.name  # type: ignore[attr-defined]


def expected_levels(grid: IntegerFormat | MidriseFormat) -> list[Fraction]:
    """The grid written out from its definition, no code shared."""
    n = 2**grid.bits
    if isinstance(grid, MidriseFormat):
        return [Fraction(2 * i - (n - 1), 2) for i in range(n)]
    return [Fraction(i - n // 2 if grid.signed else i) for i in range(n)]


def half_even(v: torch.Tensor, grid: IntegerFormat | MidriseFormat) -> list[float]:
    """The nearest level; of two equally near ones that whose rank from the level 0 (midrise: 1/2) is even.

    By brute force in float64, where distances of these numbers are exact.
    """
    levels = np.array([float(level) for level in expected_levels(grid)])
    distance = np.abs(v.double().numpy()[:, None] - levels)
    rank = levels + (levels[0] % 1)
    distance += np.where(rank % 2 == 0, 0.0, 1e-9)  # decides ties only
    return levels[distance.argmin(1)].tolist()


@pytest.mark.parametrize("grid", GRIDS, ids=by_name)
class TestEveryGrid:
    def test_levels(self, grid):
        want = expected_levels(grid)
        assert [Fraction(v) for v in grid.levels().tolist()] == want
        assert (grid.min, grid.max) == (float(want[0]), float(want[-1]))
        assert isinstance(grid.min, float)
        assert isinstance(grid.max, float)
        assert grid.widest_gap == 1.0
        assert grid.exact_in_bf16 is True
        assert torch.equal(grid.levels().to(torch.bfloat16).to(torch.float32), grid.levels())

    def test_encode_and_decode_are_exact_over_all_codes(self, grid):
        codes = torch.arange(2**grid.bits, dtype=torch.uint8)
        values = grid.decode(codes)
        assert values.dtype == torch.float32
        assert grid.encode(values).dtype == torch.uint8
        assert torch.equal(grid.encode(values), codes)
        want = expected_levels(grid)
        if (
            isinstance(grid, IntegerFormat) and grid.signed
        ):  # two's complement: codes from 2^(b-1) are negative
            want = want[2 ** (grid.bits - 1) :] + want[: 2 ** (grid.bits - 1)]
        assert [Fraction(v) for v in values.tolist()] == want

    def test_nearest_against_brute_force(self, grid):
        v = torch.cat([torch.arange(-4 * 2**grid.bits, 4 * 2**grid.bits + 1) / 4, torch.linspace(-3, 3, 61)])
        v = v.to(torch.float32)
        assert grid.round(v).tolist() == half_even(v, grid)

    def test_around_every_midpoint(self, grid):
        """One unit in the last place beside a midpoint decides the side."""
        levels = grid.levels()
        middle = (levels[1:] + levels[:-1]) / 2
        up, down = torch.full_like(middle, INF), torch.full_like(middle, -INF)
        # midrise adds 1/2 in float32, which absorbs units in the last place of v around zero
        above, below = torch.nextafter(middle, up), torch.nextafter(middle, down)
        if isinstance(grid, MidriseFormat):
            above, below = middle + 2.0**-16, middle - 2.0**-16
        assert torch.equal(grid.round(above), levels[1:])
        assert torch.equal(grid.round(below), levels[:-1])

    def test_rounding_is_idempotent_and_saturates(self, grid):
        v = torch.tensor([-INF, -1e30, grid.min - 1, grid.min - 0.5, grid.max + 0.5, grid.max + 1, 1e30, INF])
        assert grid.round(v).tolist() == [grid.min] * 4 + [grid.max] * 4
        assert torch.equal(grid.round(grid.levels()), grid.levels())

    def test_nan_stays_nan_and_is_stored_as_zero(self, grid):
        for noise in (None, torch.zeros(1)):
            assert grid.round(torch.tensor([NAN]), noise).isnan().all()
        stored = grid.decode(grid.encode(torch.tensor([NAN]))).item()
        assert stored == (0.5 if isinstance(grid, MidriseFormat) else 0.0)

    def test_stochastic_share_is_the_fraction(self, grid):
        """Over the noise i/4096, i = 0..4095, the share rounded up is the fraction itself, to the last count."""
        noise = torch.arange(4096) / 4096
        base = float(grid.levels()[grid.levels().numel() // 2 - 1])
        for numerator in (0, 1, 7, 1024, 2048, 4095):
            v = torch.full((4096,), base + numerator / 4096)
            rounded = grid.round(v, noise)
            assert set(rounded.tolist()) <= {base, base + 1}
            assert int((rounded > base).sum()) == numerator
        assert torch.equal(grid.round(grid.levels(), torch.zeros(2**grid.bits)), grid.levels())

    def test_stochastic_saturates(self, grid):
        for u in (0.0, 0.5, 1 - 2.0**-24):
            v = torch.tensor([-INF, -1e30, grid.min - 0.75, grid.max + 0.75, 1e30, INF])
            assert grid.round(v, torch.full((6,), u)).tolist() == [grid.min] * 3 + [grid.max] * 3

    @PROFILE
    @given(values=st.lists(st.floats(-300, 300, width=32), min_size=2, max_size=20))
    def test_monotone_idempotent_and_nearest(self, grid, values):
        v = torch.tensor(sorted(values), dtype=torch.float32)
        rounded = grid.round(v)
        assert bool((rounded[1:] >= rounded[:-1]).all())
        assert torch.equal(grid.round(rounded), rounded)
        inside = v.clamp(grid.min, grid.max)
        assert bool(((rounded - inside).abs() <= 0.5 + 2.0**-15).all())


@PROFILE
@given(v=st.floats(-127, 126, width=32), u=st.floats(0, 1, exclude_max=True, width=32))
def test_stochastic_rounding_never_leaves_the_neighbours(v, u):
    rounded = IntegerFormat(8).round(torch.tensor([v]), torch.tensor([u])).item()
    below = Fraction(v).__floor__()
    assert rounded == (below + 1 if Fraction(u) < Fraction(v) - below else below)


def test_stochastic_rounding_compares_the_exact_fraction():
    """floor(v + noise) would round 100 + 2^-24 + (1 - 2^-24) up to 101 although the fraction is 0."""
    noise = torch.tensor([1 - 2.0**-24])
    assert IntegerFormat(8).round(torch.tensor([100.0]), noise).item() == 100.0
    assert IntegerFormat(8).round(torch.tensor([2.0**-30]), torch.tensor([0.0])).item() == 1.0


def test_stochastic_rounding_is_unbiased():
    """300,000 draws: the mean error of a Bernoulli with variance <= 1/4 stays below 5 sigma = 5 / (2 sqrt n)."""
    generator = torch.Generator().manual_seed(0)
    n = 300_000
    for grid in (IntegerFormat(4), IntegerFormat(4, signed=False), MidriseFormat(4)):
        v = torch.rand(n, generator=generator) * (grid.max - grid.min) + grid.min
        error = (grid.round(v, torch.rand(n, generator=generator)) - v).to(torch.float64)
        assert abs(error.mean().item()) < 5 * 0.5 / n**0.5
        # E (Q - v)^2 = f (1 - f), 1/6 over uniform fractions: twice that of rounding to nearest
        assert error.square().mean().item() == pytest.approx(1 / 6, rel=0.01)


def test_midrise_is_the_grid_of_quest():
    """q = D (round(x/D + 1/2) - 1/2) with D = 2 k / (2^b - 1), written out in Python."""
    for bits in (1, 2, 4):
        grid, k = MidriseFormat(bits), 1.7
        step = 2 * k / (2**bits - 1)
        for i in range(-40, 41):
            x = i * 0.0617
            q = min(max(round(x / step + 0.5) - 0.5, -(2**bits - 1) / 2), (2**bits - 1) / 2)
            assert grid.round(torch.tensor([x / step], dtype=torch.float32)).item() == q


@pytest.mark.parametrize(
    ("bits", "signed"), [(0, True), (1, True), (9, True), (0, False), (9, False), (-1, False)]
)
def test_integer_widths(bits, signed):
    with pytest.raises(
        ValueError, match=rf"^integer of {bits} bits: allowed are int2\.\.int8 and uint1\.\.uint8$"
    ):
        IntegerFormat(bits, signed=signed)


@pytest.mark.parametrize("bits", [0, 9, -3])
def test_midrise_widths(bits):
    with pytest.raises(ValueError, match=rf"^midrise grid of {bits} bits: allowed are midrise1\.\.midrise8$"):
        MidriseFormat(bits)


def test_names_and_counterparts():
    assert [g.name for g in GRIDS] == (
        [f"int{b}" for b in range(2, 9)]
        + [f"uint{b}" for b in range(1, 9)]
        + [f"midrise{b}" for b in range(1, 9)]
    )
    assert IntegerFormat(5) == IntegerFormat(5, signed=True)
    for bits in range(2, 9):
        assert IntegerFormat(bits).unsigned() == IntegerFormat(bits, signed=False)
        assert IntegerFormat(bits, signed=False).unsigned() == IntegerFormat(bits, signed=False)
    assert len({*GRIDS, *GRIDS}) == len(GRIDS)


def test_codes_keep_their_shape():
    v = torch.tensor([[-1.0, 2.0, 0.0], [7.0, -8.0, 3.0]])
    codes = IntegerFormat(4).encode(v)
    assert codes.tolist() == [[15, 2, 0], [7, 8, 3]]
    assert torch.equal(IntegerFormat(4).decode(codes), v)
