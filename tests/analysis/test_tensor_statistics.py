"""Each number on a tensor for which it is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from qtrain.analysis import tensor_statistics as of
from qtrain.quant import QuantSpec, dequantize_values, quantize_values


def test_sqnr() -> None:
    assert of.sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5])) == pytest.approx(
        10 * math.log10(100)
    )


def test_shares_of_an_integer_grid() -> None:
    """int4 with a fixed range of 7: scale 1, codes -8 to 7."""
    spec = QuantSpec(format="int4", granularity="tensor", clip="fixed:7.0")
    x = torch.tensor([[0.0, 0.4, -0.4, 0.6, 7.0, -8.6, 9.0, -7.0]])
    q = quantize_values(x, spec)
    assert float(q.scale) == 1.0
    assert of.clipped(x, q.scale, None, spec) == 2 / 8
    assert of.underflow(x, dequantize_values(q.values, q.scale, spec)) == 2 / 8
    # 7 twice, -8, and -7: as far from 0 as the range of an absmax reaches
    assert of.saturated(q.values, None, spec) == 4 / 8


def test_absmax_clips_nothing_and_saturates_one_a_scale() -> None:
    spec = QuantSpec(format="int8", granularity="row")
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).abs() + 0.1
    q = quantize_values(x, spec)
    assert of.clipped(x, q.scale, None, spec) == 0
    assert of.saturated(q.values, None, spec) >= 7 / x.numel()
    assert of.saturated(q.values, None, spec) < 14 / x.numel()


def test_a_zero_point_moves_the_range() -> None:
    """0 to 15 in sixteen codes from -5: nothing is clipped, the two ends are saturated."""
    spec = QuantSpec(format="uint4", granularity="tensor", symmetric=False)
    x = torch.arange(-5.0, 11.0)[None]
    q = quantize_values(x, spec)
    assert q.zero_point is not None
    assert float(q.zero_point) == 5.0
    assert of.clipped(x, q.scale, q.zero_point, spec) == 0
    assert of.saturated(q.values, q.zero_point, spec) == 2 / 16
    assert of.clipped(x * 2, q.scale, q.zero_point, spec) == pytest.approx(8 / 16)


def test_kurtosis() -> None:
    assert of.kurtosis(torch.tensor([-1.0, 1.0]).repeat(10)) == 1.0
    # One of n is 1: p = 1/n, and the kurtosis of a Bernoulli is 1/(p(1-p)) - 3
    p = 1 / 50
    x = torch.zeros(50)
    x[3] = 1.0
    assert of.kurtosis(x + 5) == pytest.approx(1 / (p * (1 - p)) - 3)
    assert math.isnan(of.kurtosis(torch.ones(5)))


def test_max_over_the_percentile() -> None:
    x = torch.arange(1.0, 2001.0)
    x[7] = -8000.0  # 8 was there; 0.1 % of 2000 are two: the third largest is 1999
    assert of.max_over_p999(x.reshape(40, 50)) == pytest.approx(8000 / 1999)
    large = torch.ones(3 * of.SAMPLED + 1)
    large[1] = 5.0  # between the samples: a maximum is of all
    assert of.max_over_p999(large) == 5.0


def test_the_share_of_leading_directions() -> None:
    """Singular values 8, 4, 2, 1 in random bases: the best two have 80 of 85."""
    random = torch.Generator().manual_seed(1)
    u = torch.linalg.qr(torch.randn(9, 4, generator=random)).Q
    v = torch.linalg.qr(torch.randn(6, 4, generator=random)).Q
    x = u @ torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0])) @ v.t()
    assert of.top_share(x, 2) == pytest.approx(80 / 85, abs=2e-3)
    assert of.top_share(x, 100) == pytest.approx(1.0)
    assert math.isnan(of.top_share(torch.zeros(3, 3), 2))
    noise = torch.randn(64, 96, generator=random)
    true = torch.linalg.svdvals(noise).square()
    assert 0.85 < of.top_share(noise, 8) / float(true[:8].sum() / true.sum()) <= 1 + 1e-5


def test_direction_and_length_of_a_gradient() -> None:
    exact, seen = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
    assert of.cosine(seen, exact) == pytest.approx(24 / 25)
    assert of.alignment(seen, exact) == pytest.approx(24 / 25)
    assert of.cosine(0.5 * exact, exact) == pytest.approx(1.0)
    assert of.alignment(0.5 * exact, exact) == pytest.approx(0.5)
    assert of.alignment(exact, 0.5 * exact) == pytest.approx(2.0)


def test_the_noise_floor() -> None:
    """std 1 against a noise of +-0.5 in turns."""
    exact = torch.tensor([1.0, 1.0, -1.0, -1.0])
    seen = exact + torch.tensor([0.5, -0.5, 0.5, -0.5])
    assert of.noise_floor(seen, exact) == pytest.approx(1 / (math.sqrt(3) * 0.5))
    assert of.noise_floor(exact, exact) == math.inf
    # A constant error is a bias, no noise
    assert of.noise_floor(exact + 3, exact) == math.inf


def test_updates() -> None:
    before, after = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert of.update_ratio(before, after) == pytest.approx(0.1)
    assert of.angle(before, 7 * before) == pytest.approx(0, abs=1e-12)
    assert of.angle(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])) == pytest.approx(math.pi / 2)
    small = torch.tensor([1.0, 1e-5])  # the arc cosine of 1 - 5e-11 would be lost in float32
    assert of.angle(torch.tensor([1.0, 0.0]), small) == pytest.approx(1e-5, rel=1e-6)


def test_oscillation() -> None:
    w_before, w_after = torch.tensor([0.4, 0.9]), torch.tensor([0.6, 1.0])
    q_before, q_after = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])
    assert of.oscillation(w_before, w_after, q_before, q_after) == pytest.approx(1.0 / 0.3)
    assert of.changed(q_before, q_after) == 0.5


def test_second_moments() -> None:
    true, decoded = torch.tensor([0.0, 1e-9, 1e-9, 4.0]), torch.tensor([0.0, 0.0, 1e-9, 4.0])
    assert of.zero_bin(true, decoded) == 0.25
    assert of.largest_inverse(decoded, 1e-8) == pytest.approx(1e8)
    assert of.largest_inverse(torch.tensor([4.0, 9.0]), 0.5) == pytest.approx(0.4)
    assert of.largest_inverse(decoded, 0.0) == math.inf


def test_z_loss() -> None:
    assert of.z_loss(torch.zeros(2, 3, 8)) == pytest.approx(math.log(8) ** 2)
    assert of.z_loss(torch.full((2, 8), 100.0)) == pytest.approx((100 + math.log(8)) ** 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(bad: float) -> None:
    x = torch.ones(4, 4)
    x[1, 2] = bad
    for number in (
        of.sqnr_db(x, x + 1),
        of.kurtosis(x),
        of.top_share(x, 2),
        of.cosine(x, torch.ones(4, 4)),
        of.noise_floor(x, torch.ones(4, 4)),
        of.update_ratio(x, x + 1),
    ):
        assert not math.isfinite(number)
