"""What the study claims, and whether its runs bear it out.

Losses are nats per token. A gap is (arm - reference) of the validation losses of runs with the same seed, which saw the same
initial weights, batches and windows. It has two intervals, since two things could have been otherwise:

    seeds     mean of the seeds' gaps +- t_{n-1} s / sqrt(n): other initial weights, another order of the data
    windows   mean over windows of (arm - reference, averaged over seeds) +- t s / sqrt(windows): other text of that kind

A claim is a range in which the gap must lie. It holds where every seed and both intervals lie in it, it does not where none
of them touches it, and else the study cannot tell. Beside them stands the sign test: the chance that a coin would have agreed
with the claim for so many of the seeds. Three seeds cannot bring it below 1/8, which is why it decides nothing alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from study_runs import BASELINE

from qtrain.analysis.paired import CONFIDENCE, student_t

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot tell"
Interval = tuple[float, float]


@dataclass(frozen=True)
class Claim:
    """The gap of ``arm`` to ``reference`` lies in the open range (low, high), in nats or in percent of the reference's loss."""

    text: str
    arm: str
    low: float = -math.inf
    high: float = math.inf
    reference: str = BASELINE
    percent: bool = False

    def __contains__(self, gap: float) -> bool:
        return self.low < gap < self.high or (gap == math.inf == self.high)

    def expected(self) -> str:
        unit = " %" if self.percent else ""
        if self.low == -self.high:
            return f"within {self.high:g}{unit}"
        return f"> {self.low:g}{unit}" if self.high == math.inf else f"< {self.high:g}{unit}"


# A run that lost this much learned next to nothing of what its twin learned in the last hundred steps.
BROKEN = 0.2
CLAIMS = (
    Claim("m2 in linear int8 with one scale a tensor breaks", "m2_int8_tensor", low=BROKEN),
    Claim("m2 in linear int8 with a scale a row breaks", "m2_int8_row", low=BROKEN),
    Claim("m2 in dynamic 8 bits, blocks of 128, costs nothing to speak of", "m2_dynamic8", low=-0.03, high=0.03),
    Claim("m2 in linear 4 bits with a zero breaks", "m2_uint4", low=BROKEN),
    Claim("m2 in linear 4 bits without a zero does not break", "m2_linear4_nozero", high=BROKEN),
    Claim("int4 activations are worse with one scale a tensor than with one a token", "a4_tensor", low=0, reference="a4_token"),
    Claim("int8 weights and activations cost less than one percent", "w8a8", low=-1, high=1, percent=True),
)  # fmt: skip


@dataclass(frozen=True)
class ArmResult:
    """val_losses: of each seed. windows: [seeds, windows], nats per token; rows of NaN where a run was not finite.
    Seeds stand in the same order in all arms."""

    val_losses: NDArray[np.float64]
    windows: NDArray[np.float64]


@dataclass(frozen=True)
class Gap:
    """per_seed, mean, and the two intervals, in nats or percent."""

    per_seed: NDArray[np.float64]
    mean: float
    over_seeds: Interval
    over_windows: Interval


@dataclass(frozen=True)
class Verdict:
    """agree: seeds for which the claim holds. p: of the one-sided sign test. least_p: what it could have been at best."""

    claim: Claim
    gap: Gap
    agree: int
    p: float
    least_p: float
    outcome: str


def mean_interval(values: Sequence[float] | NDArray[np.float64]) -> Interval:
    """Student's interval of the mean. One value gives (-inf, inf); infinite ones reach from the least to infinity."""
    found = np.asarray(values, dtype=np.float64)
    if not np.isfinite(found).all():
        return (float(found.min()), math.inf)
    if len(found) < 2:
        return (-math.inf, math.inf)
    half = student_t(CONFIDENCE, len(found) - 1) * float(found.std(ddof=1)) / math.sqrt(len(found))
    return (float(found.mean()) - half, float(found.mean()) + half)


def sign_test(agree: int, trials: int) -> float:
    """The chance that of so many fair coins at least ``agree`` fall on the claim's side."""
    return sum(math.comb(trials, k) for k in range(agree, trials + 1)) / 2**trials


def gap_between(arm: ArmResult, reference: ArmResult, percent: bool = False) -> Gap:
    """Raises ValueError where the reference was not finite: there is nothing to compare with."""
    if not np.isfinite(reference.val_losses).all():
        raise ValueError("the reference has runs that were not finite, so that no gap to it means anything")
    scale = 100 / reference.val_losses if percent else np.ones_like(reference.val_losses)
    per_seed = (arm.val_losses - reference.val_losses) * scale
    finite = np.isfinite(arm.val_losses)
    if finite.all():
        differences = ((arm.windows - reference.windows) * scale[:, None]).mean(axis=0)
        over_windows = mean_interval(differences)
    else:
        over_windows = (math.inf, math.inf)
    return Gap(per_seed, float(per_seed.mean()), mean_interval(per_seed), over_windows)


def judge(claim: Claim, results: Mapping[str, ArmResult]) -> Verdict:
    """Whether the claim holds, does not, or cannot be told."""
    gap = gap_between(results[claim.arm], results[claim.reference], claim.percent)
    agree, trials = sum(float(g) in claim for g in gap.per_seed), len(gap.per_seed)
    intervals = (gap.over_seeds, gap.over_windows)
    if agree == trials and all(end in claim for interval in intervals for end in interval):
        outcome = HOLDS
    elif agree == 0 and all(high <= claim.low or low >= claim.high for low, high in intervals):
        outcome = FAILS
    else:
        outcome = UNKNOWN
    return Verdict(claim, gap, agree, sign_test(agree, trials), sign_test(trials, trials), outcome)
