"""Paired differences against the tables of Student's t and by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from qtrain.analysis.paired import paired, sign_test, student_t, window_interval


@pytest.mark.parametrize(
    ("confidence", "dof", "expected"),
    [  # two-sided critical values as printed tables have them (NIST/SEMATECH e-Handbook, 1.3.6.7.2)
        (0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 3, 3.182), (0.95, 4, 2.776), (0.95, 5, 2.571), (0.95, 10, 2.228),
        (0.95, 29, 2.045), (0.95, 100, 1.984), (0.9, 1, 6.314), (0.9, 2, 2.920), (0.9, 7, 1.895), (0.99, 3, 5.841),
        (0.99, 8, 3.355), (0.99, 2, 9.925),
    ],
)  # fmt: skip
def test_student_s_t_is_that_of_the_tables(confidence: float, dof: int, expected: float) -> None:
    assert student_t(confidence, dof) == pytest.approx(expected, abs=6e-4)


def test_three_pairs_by_hand() -> None:
    found = paired({0: 2.0, 1: 2.3, 2: 2.1, 7: 9.0}, {2: 2.0, 1: 2.0, 0: 1.8, 8: 0.0})
    assert list(found.differences) == [0, 1, 2]
    assert found.mean == pytest.approx(0.2)
    # sd of .2, .3, .1 is .1; 4.3027 * .1 / sqrt 3 = .2484
    assert (found.low, found.high) == (pytest.approx(-0.0484, abs=1e-4), pytest.approx(0.4484, abs=1e-4))


def test_one_pair_has_no_interval_and_none_no_mean() -> None:
    one = paired({3: 2.0}, {3: 1.5, 4: 1.0})
    assert (one.mean, one.low, one.high, one.seeds_to_tell(0.1)) == (0.5, None, None, None)
    none = paired({1: 2.0}, {2: 2.0})
    assert (none.n, none.mean, none.low) == (0, None, None)


def test_what_diverged_is_not_averaged() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="seed 1"):
            paired({0: 1.0, 1: bad}, {0: 1.0, 1: 1.0})
        with pytest.raises(ValueError, match="seed 1"):
            paired({0: 1.0}, {0: 1.0, 1: bad})


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Common noise of a seed cancels; of 4000 studies of 4 seeds, 90 % hold the true difference within 1.5 points (three
    standard errors)."""
    draw = random.Random(0)
    inside = 0
    for _ in range(4000):
        base = {s: draw.gauss(3.0, 1.0) for s in range(4)}
        found = paired({s: b + 0.02 + draw.gauss(0, 0.01) for s, b in base.items()}, base, 0.9)
        inside += found.low <= 0.02 <= found.high
    assert inside / 4000 == pytest.approx(0.9, abs=0.015)


def test_how_many_seeds_would_tell() -> None:
    values = {
        0: 0.1,
        1: 0.3,
        2: 0.2,
    }  # sd .1, mean .2, the bound .1 away: t_{n-1} / sqrt n < 1 first at 7 (2.447/2.646)
    found = paired(values, dict.fromkeys(values, 0.0))
    assert found.seeds_to_tell(0.3) == 7
    assert found.seeds_to_tell(0.2) is None


@pytest.mark.parametrize(
    ("values", "p", "attainable"),
    [
        ([0.1, 0.2, 0.3], 0.25, 0.25),
        ([0.1, 0.2, -0.3], 1.0, 0.25),
        ([0.1] * 6, 0.03125, 0.03125),
        ([0.1] * 9 + [-1.0], 22 / 1024, 2 / 1024),  # 2 (C(10,0) + C(10,1)) / 2^10
        ([0.0, 0.1], 1.0, 1.0),  # a zero has no sign
        ([], 1.0, 1.0),
    ],
)
def test_the_sign_test_and_what_it_can_say(values, p: float, attainable: float) -> None:
    found = sign_test(values)
    assert (found.p, found.attainable) == (pytest.approx(p), pytest.approx(attainable))


def test_the_interval_over_windows_is_that_of_gaussian_means() -> None:
    """Of many windows the percentile interval is mean +- 1.96 sd / sqrt(n)."""
    draw = np.random.default_rng(3)
    reference = draw.normal(3.0, 1.0, 400)
    treated = reference + draw.normal(0.05, 0.2, 400)
    mean, low, high = window_interval(treated, reference)
    difference = treated - reference
    half = 1.96 * difference.std() / 20
    assert mean == pytest.approx(difference.mean())
    assert low == pytest.approx(mean - half, abs=0.12 * half)
    assert high == pytest.approx(mean + half, abs=0.12 * half)
    # Paired: the spread of the windows themselves (1 nat) does not enter
    assert high - low < 0.05
    narrow = window_interval(treated, reference, 0.5)
    assert narrow[2] - narrow[1] == pytest.approx((high - low) * 0.6745 / 1.96, rel=0.1)


def test_windows_that_are_not_the_same_are_refused() -> None:
    with pytest.raises(ValueError, match="the same in both runs"):
        window_interval(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="not finite"):
        window_interval(np.array([1.0, math.nan]), np.ones(2))
