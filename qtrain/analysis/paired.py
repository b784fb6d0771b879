"""Is one training better than another? Differences of runs that share a seed, with a Student-t interval.

    d_s = treated_s - reference_s over the seeds s that both have,   mean(d) +- t_{n-1} sd(d) / sqrt(n)

Runs of a seed share initial weights and the order of the data, so that most of what a seed does cancels in d_s. With the
three to five seeds that people can afford a bootstrap over them would be far too narrow (of three seeds, one resample in
nine draws one seed only); the t interval is exact where the d_s are Gaussian. One seed gives no interval at all.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
# Where more seeds than this would be needed, more seeds are not the remedy.
MOST_SEEDS = 100


def _central_probability(t: float, dof: int) -> float:
    """P(|T| < t) for a whole number of degrees of freedom: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(dof))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = dof % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(2 + odd, dof + 1, 2):
        total += term
        term *= (k - 1) / k * cosine * cosine
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def student_t(confidence: float, dof: int) -> float:
    """The t with P(|T| < t) = confidence. Raises ValueError for dof < 1 or a confidence outside (0, 1)."""
    if dof < 1 or not 0 < confidence < 1:
        raise ValueError(f"dof={dof}, confidence={confidence}: must be 1 or more, and between 0 and 1")
    low, high = 0.0, 1.0
    while _central_probability(high, dof) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _central_probability(middle, dof) < confidence else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class PairedDifference:
    """differences: seed -> treated - reference. mean, low, high: None where there are too few (mean 0, interval 1)."""

    differences: Mapping[int, float]
    confidence: float = CONFIDENCE

    @property
    def n(self) -> int:
        return len(self.differences)

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.differences.values()) if self.n else None

    @property
    def half_width(self) -> float | None:
        if self.n < 2:
            return None
        deviation = statistics.stdev(self.differences.values())
        return student_t(self.confidence, self.n - 1) * deviation / math.sqrt(self.n)

    @property
    def low(self) -> float | None:
        return None if self.half_width is None or self.mean is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        return None if self.half_width is None or self.mean is None else self.mean + self.half_width

    def seeds_to_tell(self, bound: float) -> int | None:
        """About how many seeds would put ``bound`` outside of the interval, if mean and deviation stay as they are; None
        where more than MOST_SEEDS, or where there is no deviation to go by."""
        if self.n < 2 or self.mean is None:
            return None
        deviation, distance = statistics.stdev(self.differences.values()), abs(bound - self.mean)
        for n in range(2, MOST_SEEDS + 1):
            if student_t(self.confidence, n - 1) * deviation / math.sqrt(n) < distance:
                return n
        return None


def paired(
    treated: Mapping[int, float], reference: Mapping[int, float], confidence: float = CONFIDENCE
) -> PairedDifference:
    """seed -> a number of the run. Seeds that only one of them has are left out. Raises ValueError for a number that is
    not finite: what diverged is not averaged, it is named."""
    for which in (treated, reference):
        for seed, value in which.items():
            if not math.isfinite(value):
                raise ValueError(f"seed {seed}: {value} cannot be averaged; leave the run out, and say so")
    shared = sorted(set(treated) & set(reference))
    return PairedDifference({seed: treated[seed] - reference[seed] for seed in shared}, confidence)


@dataclass(frozen=True)
class SignTest:
    """positive, negative: how many differences of each sign (zeros are left out). p: the two-sided exact probability
    of so uneven a split if both signs were equally likely. attainable: the least p that this many can give,
    2^(1 - n): of three seeds 0.25, whatever they say."""

    positive: int
    negative: int

    @property
    def p(self) -> float:
        n, fewer = self.positive + self.negative, min(self.positive, self.negative)
        return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)

    @property
    def attainable(self) -> float:
        return min(1.0, 2.0 ** (1 - self.positive - self.negative))


def sign_test(differences: Iterable[float]) -> SignTest:
    """Of finite differences."""
    values = list(differences)
    return SignTest(sum(d > 0 for d in values), sum(d < 0 for d in values))


# Of a percentile interval at 95 %: with 2000 resamples the ends move by 1.5 % of the width (one standard error) from seed to seed
RESAMPLES = 2000


@cache
def _draws(n: int) -> NDArray[np.float64]:
    """[RESAMPLES, n]: how often each of n windows is drawn, over n; the same draws for every pair of runs."""
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return counts / n


def window_interval(
    treated: NDArray[np.float64], reference: NDArray[np.float64], confidence: float = CONFIDENCE
) -> tuple[float, float, float]:
    """[n], [n] nats a token of the same held-out windows -> (mean, low, high) of treated - reference: a paired percentile
    bootstrap over windows (Efron and Tibshirani 1993, section 13.3). It says how far these two trained models differ on
    such text, not what another seed would give.

    Raises ValueError for other shapes, fewer than two windows, or a loss that is not finite."""
    if treated.shape != reference.shape or treated.ndim != 1 or len(treated) < 2:
        raise ValueError(
            f"window losses of shapes {treated.shape} and {reference.shape}: two or more windows, and the same in both runs"
        )
    difference = treated - reference
    if not np.isfinite(difference).all():
        raise ValueError("a window's loss is not finite; leave the run out, and say so")
    means = _draws(len(difference)) @ difference
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(difference.mean()), float(low), float(high)
