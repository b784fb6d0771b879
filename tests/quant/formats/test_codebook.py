"""Codebooks against lists, and the dynamic tree against the published construction."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.quant.formats import CodebookFormat, get_format
from qtrain.quant.formats.codebook import dynamic_tree

PROFILE = settings(deadline=None, derandomize=True, max_examples=100)
INF, NAN = float("inf"), float("nan")
NAMES = ["dynamic4", "dynamic4_unsigned", "dynamic8", "dynamic8_unsigned", "linear4_nozero"]
UNEVEN = CodebookFormat("uneven", (-3.0, -0.5, 0.0, 0.25, 4.0))  # 5 levels: three codes name nothing
GRIDS = [*(get_format(n) for n in NAMES), UNEVEN]


def by_name(grid: object) -> str:
    return getattr(grid, "name", str(grid))


def nearest(v: float, levels: list[float]) -> float:
    """By distance, of two equally near the lower."""
    return min(levels, key=lambda level: (abs(v - level), level))


def test_the_constants():
    rows = [(g.name, g.bits, g.min, g.max, g.levels().numel(), g.exact_in_bf16) for g in GRIDS]
    assert rows == [
        ("dynamic4", 4, -0.8875, 1.0, 16, False),
        ("dynamic4_unsigned", 4, 0.0, 1.0, 16, False),
        ("dynamic8", 8, -0.99296875, 1.0, 256, False),
        ("dynamic8_unsigned", 8, 0.0, 1.0, 256, False),
        ("linear4_nozero", 4, 0.0625, 1.0, 16, True),
        ("uneven", 3, -3.0, 4.0, 5, True),
    ]
    # the last decade of dynamic<b> has 2^(b-2) (unsigned: 2^(b-1)) cells of 0.9 / that many
    assert get_format("dynamic8").widest_gap == pytest.approx(0.9 / 64)
    assert get_format("dynamic8_unsigned").widest_gap == pytest.approx(0.9 / 128)
    assert get_format("dynamic4").widest_gap == pytest.approx(0.9 / 4)
    assert get_format("linear4_nozero").widest_gap == 1 / 16
    assert UNEVEN.widest_gap == 3.75


def test_linear4_nozero():
    assert get_format("linear4_nozero").levels().tolist() == [i / 16 for i in range(1, 17)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_tree_by_its_bits(bits, signed):
    """A code is a sign, a unary exponent (zeros, then a one) and a fraction; here every code is read bit by bit.

    Unsigned codes have one bit more for exponent and fraction. The exponent of z zeros is 10^-z; the fraction of
    f bits picks the midpoint of one of 2^f equal cells of (0.1, 1). All zeros is 0, and 1 completes the table.
    """
    payload = bits - 1 if signed else bits
    values = {Fraction(0), Fraction(1)}
    for code in range(1, 2**payload):
        text = f"{code:0{payload}b}"
        zeros = text.index("1")
        fraction_bits = payload - zeros - 1
        if not signed and fraction_bits == 0:
            continue  # an unsigned tree starts at two cells: its place is taken by 1
        fraction = int(text[zeros + 1 :] or "0", 2)
        cell = Fraction(9, 10) / 2**fraction_bits
        value = (Fraction(1, 10) + cell * (fraction + Fraction(1, 2))) * Fraction(1, 10**zeros)
        values |= {value, -value} if signed else {value}
    levels = get_format(f"dynamic{bits}{'' if signed else '_unsigned'}").levels().tolist()
    assert len(levels) == 2**bits
    assert levels == pytest.approx([float(v) for v in sorted(values)], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "signed", "bits"),
    [
        ("dynamic8", True, 8),
        ("dynamic8_unsigned", False, 8),
        ("dynamic4", True, 4),
        ("dynamic4_unsigned", False, 4),
    ],
)
def test_dynamic_tree_equals_bitsandbytes(name, signed, bits):
    functional = pytest.importorskip("bitsandbytes.functional")
    want = functional.create_dynamic_map(signed=signed, max_exponent_bits=bits - 1, total_bits=bits)
    want = torch.unique(want.to(torch.float32))  # it pads short tables with zeros
    levels = get_format(name).levels()
    assert levels.numel() == want.numel()
    assert torch.allclose(levels, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=by_name)
class TestEveryCodebook:
    def test_codes_are_ranks(self, grid):
        codes = torch.arange(2**grid.bits, dtype=torch.uint8)
        values = grid.decode(codes)
        n = len(grid.table)
        assert values.dtype == torch.float32
        assert values[:n].tolist() == torch.tensor(grid.table).tolist()
        assert bool(values[n:].isnan().all())
        assert grid.encode(values[:n]).dtype == torch.uint8
        assert torch.equal(grid.encode(values[:n]), codes[:n])
        assert torch.equal(grid.levels(), values[:n])

    def test_nearest_against_brute_force(self, grid):
        levels = grid.levels()
        # float32 midpoints are inexact where levels are: there one unit in the last place is left undecided
        v = torch.cat([torch.linspace(grid.min - 0.3, grid.max + 0.3, 401), levels])
        got = grid.round(v)
        for x, q in zip(v.tolist(), got.tolist(), strict=True):
            want = nearest(x, levels.tolist())
            assert q == want or abs(abs(x - q) - abs(x - want)) < 1.2e-7

    def test_around_every_midpoint(self, grid):
        levels = grid.levels()
        middle = (levels[1:] + levels[:-1]) / 2
        assert torch.equal(grid.round(middle), levels[:-1])
        assert torch.equal(grid.round(torch.nextafter(middle, torch.full_like(middle, INF))), levels[1:])
        assert torch.equal(grid.round(torch.nextafter(middle, torch.full_like(middle, -INF))), levels[:-1])
        assert torch.equal(grid.round(levels), levels)

    def test_saturates_and_keeps_nan(self, grid):
        low, high = grid.levels()[0].item(), grid.levels()[-1].item()
        v = torch.tensor([-INF, -1e30, low - 1e-3, high + 1e-3, 1e30, INF])
        for u in (None, 0.0, 0.5, 1 - 2.0**-24):
            noise = None if u is None else torch.full((6,), u)
            assert grid.round(v, noise).tolist() == [low] * 3 + [high] * 3
            assert grid.round(torch.full((6,), NAN), noise).isnan().all()
        nan_code = grid.encode(torch.tensor([NAN])).item()
        assert grid.table[nan_code] == min(grid.table, key=abs)

    def test_stochastic_share_is_the_fraction(self, grid):
        levels = grid.levels()
        low, high = levels[:-1], levels[1:]
        noise = ((torch.arange(64) + 0.5) / 64)[:, None].expand(64, len(low)).contiguous()
        for numerator in (0, 1, 16, 32, 63, 64):
            v = (low.double() + (high - low).double() * (numerator / 64)).to(torch.float32)
            rounded = grid.round(v.expand(64, -1).contiguous(), noise)
            up = rounded == high
            assert bool((up | (rounded == low)).all())
            assert bool((up.sum(0) == numerator).all())
        # a level itself is never moved, whatever the noise
        for u in (0.0, 1 - 2.0**-24):
            assert torch.equal(grid.round(levels, torch.full_like(levels, u)), levels)

    def test_stochastic_rounding_is_unbiased(self, grid):
        generator = torch.Generator().manual_seed(3)
        n = 100_000
        v = torch.rand(n, generator=generator) * (grid.max - grid.min) + grid.min
        error = (grid.round(v, torch.rand(n, generator=generator)) - v).to(torch.float64)
        assert abs(error.mean().item()) < 5 * error.std().item() / n**0.5

    @PROFILE
    @given(values=st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=12))
    def test_monotone_and_idempotent(self, grid, values):
        rounded = grid.round(torch.tensor(sorted(values), dtype=torch.float32))
        assert bool((rounded[1:] >= rounded[:-1]).all())
        assert torch.equal(grid.round(rounded), rounded)


def test_tables_are_checked():
    message = r"^codebook 'bad' needs 2 to 256 strictly increasing levels, got {}$"
    for table in [(), (1.0,), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0, 1.0), tuple(float(i) for i in range(257))]:
        with pytest.raises(ValueError, match=message.format(len(table))):
            CodebookFormat("bad", table)
    assert CodebookFormat("two", (0.0, 1.0)).bits == 1
    assert CodebookFormat("three", (0.0, 1.0, 2.0)).bits == 2
    assert CodebookFormat("four", (0.0, 1.0, 2.0, 3.0)).bits == 2
    assert CodebookFormat("all", tuple(float(i) for i in range(256))).bits == 8


def test_unsigned_counterparts():
    for bits in (4, 8):
        unsigned = get_format(f"dynamic{bits}_unsigned")
        assert get_format(f"dynamic{bits}").unsigned() == unsigned
        assert unsigned.unsigned() is unsigned
    assert get_format("linear4_nozero").unsigned() is get_format("linear4_nozero")
    starts_at_zero = CodebookFormat("zero_up", (0.0, 0.3))
    assert starts_at_zero.unsigned() is starts_at_zero
    with pytest.raises(ValueError, match=r"^codebook 'uneven' has no unsigned counterpart$"):
        UNEVEN.unsigned()


def test_dynamic_tree_of_other_widths():
    """Three bits, written out: signed 0, 1, +-0.055, +-0.325, +-0.775; unsigned has four cells in the last decade."""
    assert dynamic_tree(3, signed=True).table == pytest.approx(
        (-0.775, -0.325, -0.055, 0.0, 0.055, 0.325, 0.775, 1.0)
    )
    assert dynamic_tree(3, signed=False).table == pytest.approx(
        (0.0, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0)
    )
    assert dynamic_tree(3, signed=True).name == "dynamic3"
    assert dynamic_tree(3, signed=False).name == "dynamic3_unsigned"


def test_the_table_stays_out_of_the_repr():
    assert repr(UNEVEN) == "CodebookFormat(name='uneven')"
    assert hash(UNEVEN) == hash(CodebookFormat("uneven", UNEVEN.table))
    assert CodebookFormat("a", (0.0, 1.0)) != CodebookFormat("a", (0.0, 2.0))


def test_nf4_by_the_quantile_construction():
    """QLoRA, appendix E, by bisection on erf in float64: no inverse of the library's own."""

    def quantile(p: float) -> float:
        low, high = -10.0, 10.0
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if (1 + math.erf(middle / math.sqrt(2))) / 2 < p else (low, middle)
        return low

    end = 0.9677083  # the paper's: the mean of 1 - 1/(2 * 15) and 1 - 1/(2 * 16)
    assert end == pytest.approx((1 - 1 / 30 + 1 - 1 / 32) / 2, abs=1e-7)
    positive = [quantile(p) for p in torch.linspace(end, 0.5, 9, dtype=torch.float64)[:-1].tolist()]
    negative = [-quantile(p) for p in torch.linspace(end, 0.5, 8, dtype=torch.float64)[:-1].tolist()]
    want = sorted([0.0, *positive, *negative])
    nf4 = get_format("nf4")
    assert list(nf4.table) == pytest.approx([x / want[-1] for x in want], abs=2e-7)
    assert (nf4.bits, nf4.min, nf4.max, len(nf4.table)) == (4, -1.0, 1.0, 16)
    assert 0.0 in nf4.table
    # two numbers as printed there
    assert nf4.table[1] == pytest.approx(-0.6961928009986877, abs=1e-7)
    assert nf4.table[14] == pytest.approx(0.7229568362236023, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "bits", "p"), [("power4", 4, 1 / 3), ("power8", 8, 1 / 3), ("power3p0.5", 3, 0.5)]
)
def test_power_law_rounds_uniformly_in_y(name, bits, p):
    """x -> y = sign(x) |x|^p -> round(y n) / n -> x, in float64; away from the thresholds, where float32 decides."""
    grid, n = get_format(name), 2 ** (bits - 1) - 1
    assert get_format(name).name == name
    x = torch.linspace(-1.2, 1.2, 20011, dtype=torch.float64)
    y = x.sign() * x.abs() ** p * n
    clear = ((y.abs() % 1) - 0.5).abs() > 1e-4
    y = y.round().clamp(-n, n) / n
    want = y.sign() * y.abs() ** (1 / p)
    got = grid.round(x.float()).double()
    assert (got - want)[clear].abs().max() < 1e-6
    assert clear.sum() > 19_000
    assert grid.levels().numel() == 2**bits - 1
    # and that is not the nearest level: thresholds lie below the midpoints
    above = grid.thresholds()[n + 1 :]
    levels = grid.levels()
    assert bool((above < (levels[n + 1 : -1] + levels[n + 2 :]) / 2).all())


def test_power_law_stochastic_rounding_is_unbiased_in_x():
    grid = get_format("power4")
    v = torch.linspace(-1, 1, 41)
    noise = (torch.arange(4096) + 0.5) / 4096
    mean = grid.round(v[:, None].expand(41, 4096), noise.expand(41, 4096)).mean(1)
    assert (mean - v).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "message"), [("power9p0.5", "9 bits"), ("power4p9", "p=9"), ("power4p0.01", "p=0.01")]
)
def test_power_laws_that_cannot_be(name, message):
    with pytest.raises(
        ValueError, match=f"power-law format of .*{message}.*: allowed are 2 to 8 bits and p from 0.1 to 4"
    ):
        get_format(name)


def test_sign_and_ternary():
    v = torch.tensor([-2.0, -0.6, -0.4, 0.4, 0.6, 2.0, NAN])
    assert get_format("sign").round(v)[:-1].tolist() == [-1, -1, -1, 1, 1, 1]
    assert get_format("ternary").round(v)[:-1].tolist() == [-1, -1, 0, 0, 1, 1]
    assert (get_format("sign").bits, get_format("ternary").bits) == (1, 2)
    assert get_format("ternary").exact_in_bf16
    assert not get_format("nf4").exact_in_bf16


@pytest.mark.parametrize(
    ("levels", "boundaries", "message"),
    [
        ((-2.0, -1.0), None, "the last one positive"),
        ((-1.0, INF), None, "finite"),
        ((-1.0, 0.0, 1.0), (0.0,), "one boundary between each level and the next, got 1"),
        ((-1.0, 0.0, 1.0), (-0.5, 1.5), "one boundary between"),
    ],
)
def test_codebooks_that_cannot_be(levels, boundaries, message):
    with pytest.raises(ValueError, match=message):
        CodebookFormat("bad", levels, boundaries)
