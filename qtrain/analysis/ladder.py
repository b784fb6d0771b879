"""The ladder: a sequence of experiments of ever lower precision, each held against the first, seed by seed.

    adopt      within the margin, with confidence, and as stable as the reference
    hold       cannot tell, or something to look at first
    not yet    worse than the margin with confidence, or a run diverged or was stopped by what it computed

The gap is the relative difference of validation losses, 100 (L / L_reference - 1) percent, paired by seed (``paired.py``).
That a rung "is not significantly worse" adopts nothing: few seeds make anything insignificant. The whole interval has to
lie below the margin (a non-inferiority test).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .paired import CONFIDENCE, PairedDifference, paired
from .run_records import RunRecord

ADOPT, HOLD, NOT_YET = "adopt", "hold", "not yet"
# Verdicts on the numbers of a run; others (interrupted, storage_failed, ...) are verdicts on its machine.
NUMERICAL = ("non_finite", "census_failed")
# What makes the losses of two runs comparable, beside the tokens they were validated on
_SAME = ("model", "schedule", "steps", "batch_sequences", "sequence_tokens", "precision", "eval_windows")
_SAME_OPTIMIZER = ("lr", "betas", "weight_decay", "clip_norm")
_SAME_SPEED = ("device", "compile", "trainer", "micro_batch_sequences", "activation_checkpointing")


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """margin_percent: of the reference's loss. min_seeds: pairs needed to adopt. clip_share_points: how many more
    percent of the steps may be clipped than in the reference. extra_spikes: how many more spikes, over all pairs."""

    # A model 6 % smaller loses as much: L ~ N^-0.076 (Kaplan et al. 2020, arXiv 2001.08361), 1.005^(-1/0.076) = 0.94
    margin_percent: float = 0.5
    min_seeds: int = 3
    confidence: float = CONFIDENCE
    clip_share_points: float = 5.0
    extra_spikes: int = 0

    def __post_init__(self) -> None:
        if not self.margin_percent > 0:
            raise ValueError(f"margin_percent={self.margin_percent!r}: must be positive, for example 0.5")
        if self.min_seeds < 2:
            raise ValueError(f"min_seeds={self.min_seeds!r}: an interval needs 2 or more")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence={self.confidence!r}: must lie between 0 and 1, for example 0.95")
        if self.clip_share_points < 0 or self.extra_spikes < 0:
            raise ValueError("clip_share_points and extra_spikes: must be 0 or more")


@dataclass(frozen=True)
class Rung:
    """One experiment: its runs that count (seed -> record), the others (record, why), and the decision. gap: percent.
    speed: tokens/s over the reference's, mean over pairs."""

    name: str
    runs: Mapping[int, RunRecord]
    left_out: Sequence[tuple[RunRecord, str]]
    gap: PairedDifference | None
    decision: str
    reasons: Sequence[str]
    speed: float | None = None
    notes: Sequence[str] = field(default=())

    def mean(self, of: str) -> float | None:
        """The mean over runs of a number in their summaries."""
        found = [float(run.summary[of]) for run in self.runs.values() if run.summary.get(of) is not None]
        return statistics.fmean(found) if found else None

    @property
    def clip_share(self) -> float | None:
        found = [run.clip_share for run in self.runs.values() if run.clip_share is not None]
        return statistics.fmean(found) if found else None

    @property
    def spikes(self) -> int:
        return sum(len(run.spikes) for run in self.runs.values())

    @property
    def state_bytes_per_parameter(self) -> float | None:
        found = [
            run.summary["optimizer_state_bytes"]["total"] / run.summary["parameters"]
            for run in self.runs.values()
            if run.summary.get("optimizer_state_bytes")
        ]
        return statistics.fmean(found) if found else None


def _facts(run: RunRecord) -> dict[str, Any]:
    optimizer = run.config.get("optimizer", {})
    return {
        **{key: run.config.get(key) for key in _SAME},
        **{f"optimizer.{key}": optimizer.get(key) for key in _SAME_OPTIMIZER},
        "data": run.summary.get("data"),
    }


def _difference(run: RunRecord, standard: RunRecord) -> str | None:
    mine, theirs = _facts(run), _facts(standard)
    different = [f"{key} is {mine[key]}, there {theirs[key]}" for key in mine if mine[key] != theirs[key]]
    return f"not comparable with {standard.folder}: {'; '.join(different)}" if different else None


def _sorted_out(
    records: Sequence[RunRecord], standard: RunRecord | None
) -> tuple[dict[int, RunRecord], list[tuple[RunRecord, str]]]:
    """The one completed, comparable run of each seed (of several the last by name), and why each other is left out."""
    kept: dict[int, RunRecord] = {}
    left_out = []
    for run in records:
        why = run.problem
        if why is None and standard is not None:
            why = _difference(run, standard)
        if why is not None:
            left_out.append((run, why))
            continue
        if run.seed in kept:
            left_out.append((kept[run.seed], f"another run of seed {run.seed} follows it: {run.folder.name}"))
        kept[run.seed] = run
    return kept, left_out


def _numerical_failures(left_out: Sequence[tuple[RunRecord, str]]) -> list[str]:
    return [
        f"seed {run.seed} {'diverged' if run.state == 'diverged' else 'was stopped'}: {why}"
        for run, why in left_out
        if run.state == "diverged" or (run.state == "stopped" and why.split(" ")[0] in NUMERICAL)
    ]


def _quality(gap: PairedDifference, limits: Thresholds) -> tuple[str, str]:
    margin = limits.margin_percent
    if gap.mean is None:
        return HOLD, "cannot tell: it has no seed in common with the reference"
    if gap.low is None or gap.high is None or gap.n < limits.min_seeds:
        return (
            HOLD,
            f"cannot tell from {gap.n} paired seed{'s' * (gap.n != 1)}: {limits.min_seeds} are needed",
        )
    if gap.low > margin:
        return NOT_YET, f"worse by {gap.low:.2f} % or more, the margin is {margin:g} %"
    if gap.high > margin:
        more = gap.seeds_to_tell(margin)
        wanted = "more seeds alone will not" if more is None else f"about {more} seeds would"
        return HOLD, f"cannot tell: the interval holds the margin of {margin:g} %; {wanted} settle it"
    better = ", better than the reference" if gap.high < 0 else ""
    return ADOPT, f"at most {gap.high:+.2f} %, within the margin of {margin:g} %{better}"


def _stability(runs: Mapping[int, RunRecord], reference: Rung, limits: Thresholds) -> list[str]:
    """What is less stable than in the reference, over the seeds that both have."""
    seeds = sorted(set(runs) & set(reference.runs))
    found = []
    spikes = [sum(len(side[s].spikes) for s in seeds) for side in (runs, reference.runs)]
    if spikes[0] > spikes[1] + limits.extra_spikes:
        found.append(f"{spikes[0]} loss spikes, the reference has {spikes[1]}")
    shares = [[side[s].clip_share for s in seeds] for side in (runs, reference.runs)]
    more = [100 * (a - b) for a, b in zip(*shares, strict=True) if a is not None and b is not None]
    if more and statistics.fmean(more) > limits.clip_share_points:
        found.append(
            f"{statistics.fmean(more):.1f} points more of the steps are clipped than in the reference"
        )
    return found


def _judge(name: str, records: Sequence[RunRecord], reference: Rung, limits: Thresholds) -> Rung:
    standard = next(iter(reference.runs.values()), None)
    runs, left_out = _sorted_out(records, standard)
    losses = [{s: r.val_loss for s, r in side.items()} for side in (runs, reference.runs)]
    relative = {s: 100 * (loss / losses[1][s] - 1) for s, loss in losses[0].items() if s in losses[1]}
    gap = paired(relative, dict.fromkeys(relative, 0.0), limits.confidence)
    failures = _numerical_failures(left_out)
    if not records:
        decision, reasons = HOLD, ["missing: no run of this experiment was found"]
    elif failures:
        decision, reasons = NOT_YET, failures
    elif not runs:
        decision, reasons = HOLD, [f"none of its {len(records)} runs completed and can be compared"]
    else:
        decision, quality = _quality(gap, limits)
        unstable = _stability(runs, reference, limits)
        if unstable and decision == ADOPT:
            decision = HOLD
        reasons = [quality, *unstable]
    pairs = [(runs[s], reference.runs[s]) for s in relative]
    speeds = [a.tokens_per_s / b.tokens_per_s for a, b in pairs if a.tokens_per_s and b.tokens_per_s]
    notes = []
    missing = sorted(set(reference.runs) - set(runs)) if records else []
    if missing:
        notes.append(f"no run that counts of seed {', '.join(map(str, missing))}, which the reference has")
    if any(a.config.get(key) != b.config.get(key) for a, b in pairs for key in _SAME_SPEED):
        notes.append("its speed was measured under other settings than the reference's")
    return Rung(
        name, runs, left_out, gap, decision, reasons, statistics.fmean(speeds) if speeds else None, notes
    )


def check_rungs(names: Sequence[str]) -> None:
    """Raises ValueError for fewer than two names, or the same one twice."""
    if len(names) < 2 or len(set(names)) != len(names):
        raise ValueError(f"rungs={list(names)}: two or more different experiments, the reference first")


def climb(records: Sequence[RunRecord], names: Sequence[str], limits: Thresholds) -> list[Rung]:
    """A Rung for each of ``names``, in order; the first is the reference. Raises ValueError as ``check_rungs``."""
    check_rungs(names)
    of = {
        name: [r for r in records if r.name == name or (r.seed < 0 and r.folder.parent.name == name)]
        for name in names
    }
    first = [r for r in of[names[0]] if r.completed]
    runs, left_out = _sorted_out(of[names[0]], first[0] if first else None)
    reasons = (
        [f"{len(runs)} completed run{'s' * (len(runs) != 1)}"]
        if runs
        else ["no completed run: nothing can be decided"]
    )
    reference = Rung(names[0], runs, left_out, None, "reference", reasons, 1.0 if runs else None)
    return [reference, *(_judge(name, of[name], reference, limits) for name in names[1:])]


def recommended(rungs: Sequence[Rung]) -> Rung | None:
    """The highest rung that is adopted with all below it; None where it is the reference."""
    found = None
    for rung in rungs[1:]:
        if rung.decision != ADOPT:
            break
        found = rung
    return found
