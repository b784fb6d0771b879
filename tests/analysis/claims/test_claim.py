"""Every judgement can go each way, and cheap claims are measured."""

from __future__ import annotations

import math

import pytest
import torch

from qtrain.analysis.claims import (
    CLAIMS,
    FAILS,
    HOLDS,
    THEMES,
    UNKNOWN,
    Bench,
    Claim,
    Measured,
    formats,
    microscaling,
    quest,
    states,
)
from qtrain.analysis.claims import bench as bench_module

WIDE = 1e6


def outside(claim: Claim) -> float:
    return claim.low - 1.0 if claim.low > -math.inf else claim.high + 1.0


def inside(claim: Claim) -> float:
    low, high = max(claim.low, -WIDE), min(claim.high, WIDE)
    return claim.high if claim.low == -math.inf else claim.low if claim.high == math.inf else (low + high) / 2


def test_there_are_enough_of_them_and_names_are_their_own():
    assert len(CLAIMS) == sum(map(len, THEMES.values())) >= 40
    assert all(claim.source and claim.quantity and claim.says for claim in CLAIMS.values())


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=lambda c: c.name)
def test_a_fake_measurement_refutes_every_claim(claim):
    bad, good = outside(claim), inside(claim)
    assert claim.judge(Measured.exactly(bad, "")) == FAILS
    assert claim.judge(Measured.exactly(good, "")) == HOLDS
    low, high = sorted((bad, good))
    assert claim.judge(Measured(good, low, high, "")) == UNKNOWN, "an interval that reaches out of the range"
    assert claim.judge(Measured(good, -math.inf, math.inf, "")) == UNKNOWN, "one seed has no interval"
    assert claim.judge(Measured(math.nan, good, good, "")) == UNKNOWN


def test_a_claim_that_nothing_can_refute_is_refused():
    for low, high in ((-math.inf, math.inf), (2.0, 1.0)):
        with pytest.raises(ValueError, match="a range that something can miss"):
            Claim(
                name="a",
                says="",
                source="",
                quantity="",
                measure=lambda b: Measured.exactly(0, ""),
                low=low,
                high=high,
            )


def test_the_interval_is_student_s():
    m = Measured.mean([1.0, 2.0, 4.0], "")
    assert m.value == pytest.approx(7 / 3)
    half = 4.302653 * math.sqrt(7 / 3) / math.sqrt(3)  # t of 2 degrees; the variance is 7/3
    assert (m.low, m.high) == pytest.approx((7 / 3 - half, 7 / 3 + half), rel=1e-5)
    assert Measured.mean([3.0], "").high == math.inf
    assert math.isnan(Measured.mean([], "").value)
    assert math.isnan(Measured.mean([1.0, math.nan], "").value)
    assert Measured.mean([0.5, math.inf, math.inf], "").low == 0.5


CHEAP = [
    *(c.name for c in formats.CLAIMS + quest.CLAIMS),
    *("m2_int8_zero_bin", "m2_int8_blow_up_95", "m2_signed_grid"),
    *("mx_floor", "mx_ceil", "four_six", "prescale_unbiased", "no_prescale_biased", "rht_outliers"),
]


@pytest.mark.parametrize("name", CHEAP)
def test_what_needs_no_training_holds(name, tmp_path):
    """These have closed forms or large samples: one that stops holding is a bug in the algebra."""
    claim = CLAIMS[name]
    assert claim.judge(claim.measure(Bench(tmp_path))) == HOLDS


def judged(name, tmp_path) -> str:
    claim = CLAIMS[name]
    return claim.judge(claim.measure(Bench(tmp_path)))


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("w4_channel_e2m1", ("int4_row", "int4_row_mse")),
        ("w4_group32_int4", ("int3_group32", "e2m1_group32")),
        ("heavy_tails_flip", ("int8_row", "int8_group32")),
    ],
)
def test_other_formats_refute_an_ordering(name, spec, tmp_path):
    claim, kind = CLAIMS[name], "student3" if "tails" in name else "gaussian"
    assert claim.judge(formats.difference(kind, *spec)(Bench(tmp_path))) == FAILS


def test_faulty_algebra_refutes_claims(monkeypatch, tmp_path):
    """What the claims stand for: each of these mutations has one that it breaks."""
    monkeypatch.setattr(states, "decoded", lambda v, spec: v)  # nothing is quantized
    assert judged("m2_int8_zero_bin", tmp_path) == FAILS
    monkeypatch.setitem(quest.PUBLISHED, 4, 2.6)
    assert judged("quest_constants", tmp_path) == FAILS
    assert judged("trust_mask_share", tmp_path) == FAILS
    monkeypatch.setattr(
        microscaling, "fake_quantize", lambda x, spec, noise=None: 0.99 * x
    )  # draws are too short
    assert judged("prescale_unbiased", tmp_path) == FAILS
    assert microscaling.saturated("mxfp8_floor")(Bench(tmp_path)).low > CLAIMS["mx_ceil"].high
    monkeypatch.setattr(formats, "quality", lambda x, spec: 30.0)
    assert judged("eight_bit_numbers", tmp_path) == FAILS


def test_update_ratios_are_those_of_the_zero_bin():
    """beta2 = .5, stationary: 1 / sqrt(1 - .5) where v decodes to zero; float32 against itself is 1."""
    ratios = states.update_ratios(0.5, 40, "int8_tensor", gaussian=False)
    assert float(ratios.median()) == pytest.approx(math.sqrt(2), rel=1e-4)
    exact = states.update_ratios(
        0.5, 40, "int8_group1", gaussian=False
    )  # a scale an element: nothing falls to zero
    assert float((exact - 1).abs().max()) < 1e-3


def test_samples_are_what_they_are_called():
    z, t = (bench_module.rows_of(kind, 256, 1024, 0).double() for kind in ("gaussian", "student3"))
    assert float(z.var()) == pytest.approx(1, abs=0.02)
    assert float((t.abs() > 3.182).double().mean()) == pytest.approx(
        0.05, abs=0.003
    )  # the quantile of 3 degrees
    assert not torch.equal(z, bench_module.rows_of("gaussian", 256, 1024, 1).double())
