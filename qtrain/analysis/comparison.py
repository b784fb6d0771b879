"""Arms held against a baseline, seed by seed and on the axis of tokens: gaps with their intervals, tokens to the baseline's
loss, spikes, divergence, speed, memory, SQNR, and a verdict on each run.

Two intervals, since there are two questions. *Would another seed say the same?* Student's t over the paired differences of
seeds (``paired.py``), with a sign test. *Do these two trained models differ on other text of the kind?* A paired bootstrap
over held-out windows, for each seed. What diverged or did not complete is named, and averaged into nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .arms import Arm, NotComparable, allowed_differences, arms_of, find_baseline, learning_rates
from .blame import lowest_sqnr
from .curve_scores import spike_score
from .curves import Array, Operand
from .health import DIVERGED, UNSTABLE, Health, judge
from .paired import CONFIDENCE, PairedDifference, SignTest, paired, sign_test, window_interval
from .run_records import RunRecord


@dataclass(frozen=True)
class TokensToTarget:
    """target: the baseline's final validation loss of the seed. reached: tokens at which this run was there, None if
    never; extra: those minus the baseline's own. overtaken: tokens at which the baseline had this run's final loss,
    None if never."""

    target: float
    reached: float | None
    extra: float | None
    overtaken: float | None


@dataclass(frozen=True)
class ArmResult:
    """gap: nats a token, gap_fraction: of the baseline's loss; by seed, None for the baseline itself. windows: seed ->
    (mean, low, high) of the gap over held-out windows. at_common_tokens: seed -> (tokens, gap in nats) of runs that did
    not complete, at the last evaluation that both have. unstable: (runs diverged or unstable, runs judged)."""

    arm: Arm
    is_baseline: bool
    health: Mapping[int, Health]
    gap: PairedDifference | None
    gap_fraction: PairedDifference | None
    windows: Mapping[int, tuple[float, float, float]]
    tokens_to_target: Mapping[int, TokensToTarget]
    at_common_tokens: Mapping[int, tuple[float, float]]
    spikes: Mapping[int, int]
    spike_scores: tuple[float | None, float | None]
    unstable: tuple[int, int]
    sqnr: tuple[float, Operand, int] | None
    notes: Sequence[str] = field(default=())

    @property
    def label(self) -> str:
        return self.arm.label

    @property
    def sign(self) -> SignTest | None:
        return None if self.gap is None else sign_test(self.gap.differences.values())

    @property
    def val_loss(self) -> float | None:
        """Of the runs that completed and did not diverge."""
        return _mean([run.val_loss for run in _sound(self.arm, self.health).values()])

    @property
    def tokens_per_s(self) -> float | None:
        return _mean([run.tokens_per_s for run in self.arm.runs.values()])

    @property
    def state_bytes(self) -> float | None:
        """Of the optimizer, as held."""
        held = [run.summary.get("optimizer_state_bytes") for run in self.arm.runs.values()]
        return _mean([h["total"] for h in held if h])

    @property
    def extra_tokens(self) -> float | None:
        """The mean over seeds, None unless every seed that completed reached its target."""
        extra = [t.extra for t in self.tokens_to_target.values()]
        return None if None in extra else _mean(extra)


@dataclass(frozen=True)
class Comparison:
    """arms: the baseline first. unreadable: runs that belong to no arm. notes: on all of it."""

    arms: Sequence[ArmResult]
    unreadable: Sequence[RunRecord]
    confidence: float
    notes: Sequence[str]

    @property
    def baseline(self) -> ArmResult:
        return self.arms[0]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def crossing(tokens: Array, losses: Array, target: float) -> float | None:
    """The tokens at which a curve, straight between its points, is first at or below ``target``."""
    below = np.flatnonzero(losses <= target)
    if not len(below):
        return None
    i = int(below[0])
    if i == 0 or not np.isfinite(losses[i - 1]):
        return float(tokens[i])
    share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return float(tokens[i - 1] + share * (tokens[i] - tokens[i - 1]))


def tokens_to_target(run: RunRecord, reference: RunRecord) -> TokensToTarget:
    """On the validation curves of two completed runs of a seed; their last points are their final losses."""
    mine, theirs = run.curves, reference.curves
    target = reference.val_loss
    reached = crossing(mine.val_tokens, mine.val_loss, target)
    there = crossing(theirs.val_tokens, theirs.val_loss, target)
    extra = None if reached is None or there is None else reached - there
    return TokensToTarget(target, reached, extra, crossing(theirs.val_tokens, theirs.val_loss, run.val_loss))


def _at_common_tokens(run: RunRecord, reference: RunRecord) -> tuple[float, float] | None:
    """(tokens, this loss - the reference's) at the last evaluation that both have, at the same number of tokens."""
    mine, theirs = run.curves, reference.curves
    both = np.intersect1d(mine.val_tokens, theirs.val_tokens)
    if not len(both):
        return None
    at = float(both[-1])
    gap = mine.val_loss[mine.val_tokens == at][-1] - theirs.val_loss[theirs.val_tokens == at][-1]
    return at, float(gap)


def _windows(run: RunRecord, reference: RunRecord, confidence: float) -> tuple[float, float, float] | None:
    mine, theirs = run.window_losses, reference.window_losses
    if mine is None or theirs is None or mine.shape != theirs.shape or len(mine) < 2:
        return None
    return window_interval(mine, theirs, confidence)


def _sound(arm: Arm, health: Mapping[int, Health]) -> dict[int, RunRecord]:
    """The runs whose losses may be averaged."""
    return {s: run for s, run in arm.completed.items() if health[s].verdict != DIVERGED}


def _result(
    arm: Arm,
    baseline: Arm,
    health: Mapping[int, Health],
    theirs: Mapping[int, RunRecord],
    different: Mapping[str, Any],
    confidence: float,
) -> ArmResult:
    """theirs: the baseline's sound runs."""
    is_baseline, done = arm is baseline, _sound(arm, health)
    pairs = {} if is_baseline else {s: (run, theirs[s]) for s, run in done.items() if s in theirs}
    gap = paired(
        {s: a.val_loss - b.val_loss for s, (a, b) in pairs.items()}, dict.fromkeys(pairs, 0.0), confidence
    )
    fraction = paired(
        {s: a.val_loss / b.val_loss - 1 for s, (a, b) in pairs.items()}, dict.fromkeys(pairs, 0.0), confidence
    )
    intervals = {s: w for s, (a, b) in pairs.items() if (w := _windows(a, b, confidence)) is not None}
    partial = {
        s: at
        for s, run in arm.runs.items()
        if not is_baseline and s not in pairs and s in baseline.runs
        if (at := _at_common_tokens(run, baseline.runs[s])) is not None
    }
    judged = [h for h in health.values() if h.numerical]
    notes = [f"{k} is {a}, in the baseline {b} (allowed)" for k, (a, b) in different.items()]
    notes += [f"{run.folder}: an earlier run of seed {run.seed}, left out" for run in arm.earlier]
    missing = sorted(set(theirs) - set(done))
    if missing and not is_baseline:
        notes.append(f"no sound run of seed {', '.join(map(str, missing))}, which the baseline has")
    return ArmResult(
        arm=arm,
        is_baseline=is_baseline,
        health=health,
        gap=None if is_baseline else gap,
        gap_fraction=None if is_baseline else fraction,
        windows=intervals,
        tokens_to_target={s: tokens_to_target(a, b) for s, (a, b) in pairs.items()},
        at_common_tokens=partial,
        spikes={s: len(run.spikes) for s, run in arm.runs.items()},
        spike_scores=(
            _mean([spike_score(run.curves.loss) for run in arm.runs.values()]),
            _mean([_gradient_score(run) for run in arm.runs.values()]),
        ),
        unstable=(sum(h.verdict in (DIVERGED, UNSTABLE) for h in judged), len(judged)),
        sqnr=min(
            (found for run in arm.runs.values() if (found := lowest_sqnr(run)) is not None), default=None
        ),
        notes=notes,
    )


def _gradient_score(run: RunRecord) -> float | None:
    known = run.curves.grad_norm[~np.isnan(run.curves.grad_norm)]
    return spike_score(known) if len(known) else None


def compare(
    records: Sequence[RunRecord],
    *,
    baseline: str | None = None,
    allow: Sequence[str] = (),
    confidence: float = CONFIDENCE,
) -> Comparison:
    """Raises NotComparable where the baseline is not clear, and where arms differ in what ``allow`` does not name."""
    arms = arms_of(records)
    unreadable = [run for run in records if run.state == "unreadable" and run.seed < 0]
    if not arms:
        raise NotComparable(
            "none of these runs can be read: "
            + "; ".join(f"{run.folder}: {run.problem}" for run in unreadable)
        )
    standard = find_baseline(arms, baseline)
    different = allowed_differences(arms, standard, allow)
    ordered = [standard, *(arm for arm in arms if arm is not standard)]
    # Spikes of the baseline itself cannot be excused by the baseline
    health = {
        arm.label: {
            s: judge(r, None if arm is standard else standard.runs.get(s)) for s, r in arm.runs.items()
        }
        for arm in ordered
    }
    theirs = _sound(standard, health[standard.label])
    results = [_result(a, standard, health[a.label], theirs, different[a.label], confidence) for a in ordered]
    notes = [learning_rates(arms)]
    if not theirs:
        notes.append(
            f"the baseline {standard.label} has no run that completed without diverging: there are no gaps"
        )
    return Comparison(results, unreadable, confidence, notes)
