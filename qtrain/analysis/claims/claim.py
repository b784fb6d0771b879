"""A claim: a number that a paper or a measurement says lies in a range, and how to measure it here.

    holds          the whole interval of the measurement lies in the expected range
    does not hold  none of it does
    cannot tell    anything else: the measurement is too coarse at this scale, or is no number

The interval is Student's over independent repetitions (seeds, layers), or a point where the measurement is deterministic.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qtrain.analysis.paired import CONFIDENCE, student_t

from .bench import Bench

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot tell"


@dataclass(frozen=True)
class Measured:
    """value, in the claim's unit, and its interval. of: what it was measured on and how often, in a few words."""

    value: float
    low: float
    high: float
    of: str

    @staticmethod
    def exactly(value: float, of: str) -> Measured:
        return Measured(value, value, value, of)

    @staticmethod
    def mean(values: Iterable[float], of: str) -> Measured:
        """Student's 95 % interval of the mean; of one value it reaches everywhere. Infinite values are kept: the interval
        then ends there."""
        found = [float(v) for v in values]
        if not found or any(math.isnan(v) for v in found):
            return Measured(math.nan, -math.inf, math.inf, of)
        if any(math.isinf(v) for v in found):
            return Measured(statistics.fmean(found), min(found), max(found), of)
        mean = statistics.fmean(found)
        if len(found) < 2:
            return Measured(mean, -math.inf, math.inf, of)
        half = student_t(CONFIDENCE, len(found) - 1) * statistics.stdev(found) / math.sqrt(len(found))
        return Measured(mean, mean - half, mean + half, of)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """name: for ``only=``. says: the claim, one sentence. source: where it is made. low, high: the range in which the number
    must lie, ends included; ``above`` and ``below`` make open ones. quantity: what is measured, with its unit. measure: does it.
    """

    name: str
    says: str
    source: str
    quantity: str
    measure: Callable[[Bench], Measured]
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low <= self.high or (self.low, self.high) == (-math.inf, math.inf):
            raise ValueError(
                f"claim {self.name}: expects {self.low}..{self.high}: a claim needs a range that something can miss"
            )

    @property
    def expected(self) -> str:
        if self.high == math.inf:
            return f">= {self.low:g}"
        return f"<= {self.high:g}" if self.low == -math.inf else f"{self.low:g} .. {self.high:g}"

    def judge(self, m: Measured) -> str:
        """``holds``, ``does not hold`` or ``cannot tell``."""
        if math.isnan(m.value):
            return UNKNOWN
        if self.low <= m.low and m.high <= self.high:
            return HOLDS
        return FAILS if m.high < self.low or m.low > self.high else UNKNOWN
