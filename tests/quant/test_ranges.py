"""Ranges and scales against Python loops, closed-form integrals and the definitions of OCP MX and NVFP4."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qtrain.quant import get_format
from qtrain.quant.formats import IntegerFormat, MidriseFormat, format_names
from qtrain.quant.ranges import (
    MIN_SCALE,
    MSE_RATIOS,
    absmax,
    best_ratio,
    e4m3_under_tensor_scale,
    e8m0,
    gaussian_clip,
    mean_magnitude,
    prescale,
    rank_from_top,
    root_mean_square,
)

INF, NAN = float("inf"), float("nan")


def blocks_of(nr: int = 3, r: int = 2, nc: int = 4, c: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(nr, r, nc, c, generator=torch.Generator().manual_seed(seed))


def test_constants():
    assert MIN_SCALE == 2.0**-100
    assert len(MSE_RATIOS) == 33
    assert MSE_RATIOS[0] == 1.0
    assert MSE_RATIOS[-1] == pytest.approx(0.2)
    assert np.diff(MSE_RATIOS) == pytest.approx([-0.025] * 32)


def test_absmax():
    blocks = blocks_of()
    got = absmax(blocks)
    assert got.shape == (3, 1, 4, 1)
    for i in range(3):
        for j in range(4):
            assert got[i, 0, j, 0].item() == max(abs(v) for v in blocks[i, :, j].flatten().tolist())
    blocks[1, 0, 2, 3] = NAN
    blocks[0, 0, 0, 0] = -INF
    got = absmax(blocks)
    assert got.isnan().sum() == 1
    assert got[0, 0, 0, 0] == INF


@pytest.mark.parametrize("percent", [50.0, 75.0, 80.0, 89.9, 90.0, 95.0, 99.9, 100.0])
def test_rank_from_top(percent):
    blocks = blocks_of(r=4, c=5)
    counts = torch.full((3, 1, 4, 1), 20.0)
    got = rank_from_top(blocks, counts, percent)
    assert got.shape == (3, 1, 4, 1)
    left_out = {50.0: 10, 75.0: 5, 80.0: 4, 89.9: 2, 90.0: 2, 95.0: 1, 99.9: 0, 100.0: 0}[percent]
    for i in range(3):
        for j in range(4):
            ordered = sorted(blocks[i, :, j].flatten().tolist(), reverse=True)
            assert got[i, 0, j, 0].item() == ordered[left_out]


def test_rank_from_top_counts_true_elements_only():
    """Of 10, 5, 2 and 1 true elements beside zeros, 20% are 2, 1, 0 and 0."""
    blocks = torch.zeros(2, 2, 2, 5)
    blocks[0, :, 0] = torch.arange(1.0, 11).reshape(2, 5)
    blocks[0, 0, 1] = torch.arange(1.0, 6)
    blocks[1, 0, 0, :2] = torch.tensor([3.0, 4.0])
    blocks[1, 0, 1, 0] = 7.0
    counts = torch.tensor([[10.0, 5.0], [2.0, 1.0]])[:, None, :, None]
    assert rank_from_top(blocks, counts, 80.0)[:, 0, :, 0].tolist() == [[8.0, 4.0], [4.0, 7.0]]


def test_rank_from_top_of_a_thousand():
    """99.9% of 1000 leaves out exactly one, although 100 - 99.9 is a little less than 0.1 in binary."""
    blocks = torch.arange(1000.0).reshape(1, 1, 1, 1000)
    for percent, want in ((99.9, 998.0), (99.7, 996.0), (99.95, 999.0), (99.0, 989.0)):
        assert rank_from_top(blocks, torch.full((1, 1, 1, 1), 1000.0), percent).item() == want


def test_best_ratio_takes_the_least_error_of_each_block():
    """round_at(ratio) = blocks + an error that is least, block by block, at a planted ratio."""
    blocks = blocks_of()
    planted = torch.tensor([0, 5, 32, 17, 1, 2, 31, 8, 9, 10, 0, 32]).reshape(3, 1, 4, 1)
    asked = []

    def round_at(ratio: float) -> torch.Tensor:
        asked.append(ratio)
        return blocks + (planted - MSE_RATIOS.index(ratio)) * 0.25

    ratio = best_ratio(blocks, round_at)
    assert asked == list(MSE_RATIOS)
    want = torch.tensor(MSE_RATIOS)[planted]
    assert torch.equal(ratio, want)


def test_best_ratio_sums_over_the_block_and_keeps_absmax_on_ties_and_nan():
    blocks = torch.ones(2, 2, 1, 2)
    blocks[1] = NAN

    def round_at(ratio: float) -> torch.Tensor:
        return blocks + 1.0

    assert best_ratio(blocks, round_at).flatten().tolist() == [1.0, 1.0]

    def spread(ratio: float) -> torch.Tensor:
        # 0.6 is best at one element, 0.8 in the sum of the four
        error = torch.full((2, 2, 1, 2), 1.0 + abs(ratio - 0.8))
        error[0, 0, 0, 0] = abs(ratio - 0.6) * 0.1
        return blocks.nan_to_num(1.0) + error

    assert best_ratio(blocks.nan_to_num(1.0), spread)[0].item() == pytest.approx(0.8)


@pytest.mark.parametrize("exponent", [0, -120, -80, 60, 100, 125])
def test_root_mean_square_at_any_magnitude(exponent):
    blocks = blocks_of() * 2.0**exponent
    counts = torch.full((3, 1, 4, 1), 10.0)
    want = np.sqrt(np.mean(np.square(blocks.double().numpy()), axis=(1, 3), keepdims=True))
    got = root_mean_square(blocks, counts)
    assert got.shape == (3, 1, 4, 1)
    np.testing.assert_allclose(got.double().numpy(), want, rtol=1e-6)


def test_root_mean_square_of_unusual_blocks():
    counts = torch.full((1, 1, 1, 1), 4.0)

    def rms(*values: float) -> float:
        return root_mean_square(torch.tensor(values).reshape(1, 2, 1, 2), counts).item()

    assert rms(0.0, 0.0, 0.0, 0.0) == 0.0
    assert rms(3.4e38, 3.4e38, 3.4e38, -3.4e38) == pytest.approx(3.4e38)
    assert rms(1.0, 1e-30, 0.0, 0.0) == 0.5
    assert rms(2e-38, 2e-38, 2e-38, 2e-38) == pytest.approx(2e-38)
    assert math.isnan(rms(NAN, 0.0, 0.0, 0.0))
    assert not math.isfinite(rms(INF, 0.0, 0.0, 0.0))
    # the count divides, not the places of a ragged block
    assert root_mean_square(torch.tensor([[[[3.0, 4.0, 0.0]]]]), torch.full((1, 1, 1, 1), 2.0)).item() == (
        pytest.approx(math.sqrt(12.5))
    )


def test_root_mean_square_has_the_bits_of_the_plain_formula():
    blocks = blocks_of(8, 1, 8, 64)
    plain = torch.sqrt(blocks.square().sum((1, 3), keepdim=True) / 64.0)
    assert torch.equal(root_mean_square(blocks, torch.full((8, 1, 8, 1), 64.0)), plain)


# --- Gaussian clips -------------------------------------------------------------------------------------------


def gaussian_error(levels: np.ndarray, power: float = 1.0) -> float:
    """E (Q(z) - z)^2 for z ~ N(0, 1), Q to the nearest level: exact, with moments of cut-off Gaussians."""

    def moments(z: float) -> tuple[float, float, float]:
        """Integrals of 1, z, z^2 times the density from -inf to z."""
        if math.isinf(z):
            return (1.0, 0.0, 1.0) if z > 0 else (0.0, 0.0, 0.0)
        density, mass = math.exp(-z * z / 2) / math.sqrt(2 * math.pi), 0.5 * math.erfc(-z / math.sqrt(2))
        return mass, -density, mass - z * density

    # a power law decides between its levels where their powers are midpoints
    y = np.sign(levels) * np.abs(levels) ** power
    between = (y[1:] + y[:-1]) / 2
    edges = [-INF, *(np.sign(between) * np.abs(between) ** (1 / power)), INF]
    total = 0.0
    for q, a, b in zip(levels, edges, edges[1:], strict=False):
        m0, m1, m2 = (hi - lo for hi, lo in zip(moments(b), moments(a), strict=True))
        total += q * q * m0 - 2 * q * m1 + m2
    return total


def exact_clip(name: str) -> float:
    """The least exact error over a fine grid of k around a coarse one."""
    levels = get_format(name).levels().double().numpy() / get_format(name).max
    best, power = 0.0, 1 / 3 if name.startswith("power") else 1.0
    low, high, step = 0.4, 8.0, 0.02
    while step > 1e-5:
        ks = np.arange(low, high + step / 2, step)
        best = float(ks[np.argmin([gaussian_error(levels * k, power) for k in ks])])
        low, high, step = best - step, best + step, step / 10
    return best


# Max 1960, "Quantizing for minimum distortion", table II: step of the equally spaced quantizer of N levels
MAX_1960_STEP = {2: 1.596, 4: 0.9957, 8: 0.5860, 16: 0.3352, 32: 0.1881}
# Panferov et al. 2025, arXiv 2502.05003: the clips for b = 1..8
QUEST = {1: 0.798, 2: 1.494, 3: 2.051, 4: 2.514, 5: 2.916, 6: 3.277, 7: 3.601, 8: 3.885}


@pytest.mark.parametrize("bits", range(1, 6))
def test_gaussian_clip_of_midrise_grids_is_that_of_max(bits):
    step = MAX_1960_STEP[2**bits]
    assert gaussian_clip(MidriseFormat(bits)) == pytest.approx(step * (2**bits - 1) / 2, rel=5e-4)


@pytest.mark.parametrize("bits", range(1, 9))
def test_gaussian_clip_of_midrise_grids_and_the_constants_of_quest(bits):
    """Theirs agree to their digits up to 5 bits; above, where the optimum is flat, they lie below the minimum."""
    tolerance = {6: 0.0015, 7: 0.011, 8: 0.038}.get(bits, 0.001)
    assert gaussian_clip(MidriseFormat(bits)) == pytest.approx(QUEST[bits], abs=tolerance)
    ours, theirs = (
        gaussian_error(MidriseFormat(bits).levels().double().numpy() * k / MidriseFormat(bits).max)
        for k in (gaussian_clip(MidriseFormat(bits)), QUEST[bits])
    )
    assert ours <= theirs * (1 + 1e-6)
    assert ours == pytest.approx(theirs, rel=1e-2)


def test_one_bit_is_the_mean_magnitude():
    """The best two levels are +-E|z| = sqrt(2 / pi); 24 golden sections of 0.1 leave 1e-6."""
    assert gaussian_clip(MidriseFormat(1)) == pytest.approx(math.sqrt(2 / math.pi), abs=1.5e-6)


@pytest.mark.parametrize("name", format_names())
def test_gaussian_clip_minimises_the_exact_error(name):
    # the optimum of power8 is flat, and thresholds are float32
    assert gaussian_clip(get_format(name)) == pytest.approx(
        exact_clip(name), abs=1e-4 if name == "power8" else 2e-5
    )


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("int2", 1.0484),
        ("int4", 2.3703),
        ("int8", 3.9072),
        ("e2m1", 2.9225),
        ("e4m3", 4.6558),
        ("dynamic8", 3.8044),
        ("linear4_nozero", 1.5162),
    ],
)
def test_gaussian_clip_golden(name, want):
    assert gaussian_clip(get_format(name)) == pytest.approx(want, abs=6e-5)


def test_the_reference_error_against_a_large_sample():
    """2 million draws: the error of each is bounded by 1, so the mean is within 5 / sqrt(2e6) of its own scale."""
    z = np.random.default_rng(0).standard_normal(2_000_000)
    grid = np.arange(-8, 8) * (2.37 / 7)
    sampled = np.mean((z - np.clip(np.rint(z * 7 / 2.37), -8, 7) * (2.37 / 7)) ** 2)
    assert gaussian_error(grid) == pytest.approx(sampled, rel=0.01)


# --- scale formats --------------------------------------------------------------------------------------------


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(("name", "emax"), [("e2m1", 2), ("e4m3", 8), ("e5m2", 15), ("int8", 6), ("int4", 2)])
def test_e8m0_floor_is_that_of_the_mx_standard(name, emax):
    """OCP MX v1.0, 6.3: 2^(floor(log2 amax) - emax) with emax the exponent of the format's largest number."""
    amax = [1.0, 1.5, 1.999, 2.0, 3.7, 448.0, 1e-20, 6.1e30, 2.0**-60, 0.9999]
    got = e8m0(column(*amax), column(*amax), get_format(name), "e8m0")
    assert got.flatten().tolist() == [2.0 ** (math.frexp(a)[1] - 1 - emax) for a in amax]


def test_e8m0_ceil_is_the_least_power_of_two_above():
    scale = [1.0, 1.0000001, 1.5, 2.0, 2.1, 2.0**-60, 3e-20, 1e30]
    got = e8m0(column(*scale), column(*[9.0] * 8), get_format("e4m3"), "e8m0_ceil").flatten().tolist()
    for s, power in zip(column(*scale).flatten().tolist(), got, strict=True):
        assert math.frexp(power)[0] == 0.5
        assert power / 2 < s <= power


@pytest.mark.parametrize("rule", ["e8m0", "e8m0_ceil", "e8m0_down", "e8m0_prescale"])
def test_e8m0_ends(rule):
    grid = IntegerFormat(8)
    got = e8m0(column(1e-42, 2.0**-126, 0.0, NAN, INF), column(1e-42, 2.0**-126, 0.0, NAN, INF), grid, rule)
    values = got.flatten()
    assert values[:3].tolist() == [2.0**-126] * 3
    assert bool(values[3:].isnan().all())


@pytest.mark.parametrize("name", ["e2m1", "e4m3", "int8"])
def test_the_other_rules_for_powers_of_two(name):
    """down: the greatest power of two below; prescale: what OCP's scale leaves, times 3/4 (e2m1), ends within the grid."""
    grid = get_format(name)
    amax = torch.logspace(-6, 6, 97).reshape(-1, 1, 1, 1)
    down = e8m0(amax / grid.max, amax, grid, "e8m0_down").flatten()
    want = [2.0 ** math.floor(math.log2(s)) for s in (amax / grid.max).flatten().tolist()]
    assert down.tolist() == want
    ocp = e8m0(amax / grid.max, amax, grid, "e8m0")
    assert torch.equal(e8m0(amax / grid.max, amax, grid, "e8m0_prescale"), ocp)
    scaled = (amax / ocp * prescale(grid)).flatten()
    assert bool((scaled <= grid.max).all())
    assert bool((scaled > grid.max * 0.499).all())
    assert prescale(get_format("e2m1")) == 0.75
    assert prescale(get_format("e4m3")) == 7 / 8


def test_mean_magnitude():
    """Over the true elements alone, and for magnitudes whose sum leaves float32."""
    blocks = torch.tensor([[[[1.0, -3.0], [2.0, 0.0]]]]).permute(0, 1, 2, 3)  # [1, 1, 2, 2]
    counts = torch.tensor([2.0, 1.0]).reshape(1, 1, 2, 1)
    assert mean_magnitude(blocks, counts).flatten().tolist() == [2.0, 2.0]
    assert mean_magnitude(blocks * 1e38, counts).flatten().tolist() == pytest.approx([2e38, 2e38], rel=1e-6)
    assert mean_magnitude(blocks * 1e-38, counts).flatten().tolist() == pytest.approx(
        [2e-38, 2e-38], rel=1e-6
    )


def test_e4m3_under_tensor_scale():
    """NVFP4: s_t = max(scale) / 448; stored = e4m3(scale / s_t), never zero. torch's cast is the oracle."""
    scale = column(0.5, 0.31, 1e-9, 0.07, 0.0021)
    stored, tensor_scale = e4m3_under_tensor_scale(scale, scale.amax(), 448.0)
    assert tensor_scale.shape == ()
    assert tensor_scale.item() == pytest.approx(0.5 / 448, rel=1e-6)
    want = (scale / (0.5 / 448)).to(torch.float8_e4m3fn).to(torch.float32)
    want[2] = 2.0**-9
    assert torch.equal(stored, want)
    assert stored[0].item() == 448.0


def test_e4m3_under_tensor_scale_ends():
    stored, tensor_scale = e4m3_under_tensor_scale(column(1e-44, 0.0), torch.tensor(1e-44), 448.0)
    assert tensor_scale.item() == 2.0**-126
    assert stored.flatten().tolist() == [2.0**-9, 2.0**-9]
    _, tensor_scale = e4m3_under_tensor_scale(column(1.0, NAN), torch.tensor(NAN), 448.0)
    assert tensor_scale.isnan()
