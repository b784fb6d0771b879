"""The statistics and verdicts of the study of optimizer states, on made-up numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from optimizer_states_arms import ARMS
from optimizer_states_claims import (
    CLAIMS,
    FAILS,
    HOLDS,
    UNKNOWN,
    ArmResult,
    Claim,
    gap_between,
    judge,
    mean_interval,
    sign_test,
)
from study_runs import BASELINE

from .made_up_arm import result


def test_the_interval_of_a_mean() -> None:
    # s = 1, n = 3: 2 -+ 4.302653 / sqrt(3)
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)
    assert mean_interval([0.5]) == (-math.inf, math.inf)
    assert mean_interval([0.3, math.inf, 0.4]) == (0.3, math.inf)


def test_the_interval_of_a_mean_covers_it_nineteen_times_in_twenty() -> None:
    generator = np.random.default_rng(0)
    covered = [
        low < 7.0 < high for low, high in (mean_interval(generator.normal(7, 2, 3)) for _ in range(1000))
    ]
    # 950 +- 3 * sqrt(1000 * .95 * .05) = 950 +- 21
    assert 929 <= sum(covered) <= 971


@pytest.mark.parametrize(
    ("agree", "trials", "p"), [(3, 3, 1 / 8), (2, 3, 1 / 2), (0, 3, 1.0), (5, 5, 1 / 32), (8, 10, 56 / 1024)]
)
def test_the_sign_test(agree: int, trials: int, p: float) -> None:
    assert sign_test(agree, trials) == p


def test_gaps_are_paired_by_seed_and_by_window() -> None:
    base = result([2.3, 2.5, 2.4])
    gap = gap_between(result([2.4, 2.6, 2.5]), base)
    assert gap.per_seed == pytest.approx([0.1, 0.1, 0.1])
    # The seeds differ by 0.1 and the windows by 0.3, and neither is in the gap
    assert gap.over_seeds == pytest.approx((0.1, 0.1), abs=1e-6)
    assert gap.over_windows == pytest.approx((0.1, 0.1), abs=1e-6)
    assert gap_between(base, result([2.4, 2.6, 2.5])).mean == pytest.approx(-0.1)


def test_the_interval_over_windows_is_that_of_their_mean_differences() -> None:
    generator = np.random.default_rng(3)
    base, arm = generator.normal(2, 1, (2, 50)), generator.normal(2, 1, (2, 50))
    gap = gap_between(ArmResult(arm.mean(1), arm), ArmResult(base.mean(1), base))
    d = (arm - base).mean(0)
    half = 2.00958 * d.std(ddof=1) / math.sqrt(50)  # t of 49 degrees
    assert gap.over_windows == pytest.approx((d.mean() - half, d.mean() + half), abs=1e-4)


def test_percent_is_of_the_reference() -> None:
    gap = gap_between(result([2.02, 4.04]), result([2.0, 4.0]), percent=True)
    assert gap.per_seed == pytest.approx([1.0, 1.0])
    assert gap.over_windows == pytest.approx((1.0, 1.0), abs=1e-6)


BASE = [2.30, 2.50, 2.40]
BREAKS = Claim("breaks", "arm", low=0.2)
WITHIN = Claim("costs nothing", "arm", low=-0.03, high=0.03)


def verdict(claim: Claim, gaps: list[float], noise: float = 0.0) -> str:
    arm = result([b + g for b, g in zip(BASE, gaps, strict=True)], noise=noise)
    return judge(claim, {"arm": arm, BASELINE: result(BASE)}).outcome


@pytest.mark.parametrize(
    ("claim", "gaps", "noise", "expected"),
    [
        (BREAKS, [0.50, 0.52, 0.48], 0.0, HOLDS),
        (BREAKS, [0.01, 0.02, 0.00], 0.0, FAILS),
        (BREAKS, [0.50, 0.52, 0.19], 0.0, UNKNOWN),  # a seed against it
        (BREAKS, [0.21, 0.50, 0.80], 0.0, UNKNOWN),  # all seeds for it, but they differ too much
        (BREAKS, [0.21, 0.22, 0.215], 1.0, UNKNOWN),  # all seeds for it, but other windows might not be
        (BREAKS, [math.inf] * 3, 0.0, HOLDS),
        (BREAKS, [math.inf, math.inf, 0.1], 0.0, UNKNOWN),
        (WITHIN, [0.001, -0.004, 0.003], 0.0, HOLDS),
        (WITHIN, [0.10, 0.11, 0.12], 0.0, FAILS),
        (WITHIN, [-0.10, -0.11, -0.12], 0.0, FAILS),
        (WITHIN, [0.02, 0.025, 0.029], 0.0, UNKNOWN),
        (WITHIN, [0.1, math.inf, 0.1], 0.0, FAILS),
    ],
)
def test_verdicts(claim: Claim, gaps: list[float], noise: float, expected: str) -> None:
    assert verdict(claim, gaps, noise) == expected


def test_one_of_many_seeds_against_a_claim_leaves_it_open() -> None:
    """Twelve seeds narrow the interval of the mean so far that one of them lies outside of it."""
    found = judge(BREAKS, {"arm": result([2.8] * 11 + [2.49]), BASELINE: result([2.3] * 12)})
    assert found.gap.over_seeds[0] > 0.2
    assert (found.agree, found.outcome) == (11, UNKNOWN)


def test_a_verdict_says_how_little_three_seeds_can_say() -> None:
    found = judge(BREAKS, {"arm": result([2.8, 3.0, 2.5]), BASELINE: result(BASE)})
    assert (found.agree, found.p, found.least_p) == (2, 0.5, 0.125)


def test_one_seed_can_tell_nothing() -> None:
    assert judge(BREAKS, {"arm": result([3.3]), BASELINE: result([2.3])}).outcome == UNKNOWN


def test_a_broken_baseline_is_refused() -> None:
    with pytest.raises(ValueError, match="reference has runs that were not finite"):
        gap_between(result([2.0]), result([math.inf]))


def test_claims_name_arms_and_arms_are_named_once() -> None:
    names = [arm.name for arm in ARMS]
    assert len(set(names)) == len(names)
    needed = {claim.arm for claim in CLAIMS} | {claim.reference for claim in CLAIMS}
    assert needed <= {arm.name for arm in ARMS if arm.claimed}
