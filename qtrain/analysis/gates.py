"""Gates: what a comparison must show for a script to go on. Convergence as a test of continuous integration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .comparison import Comparison
from .health import VERDICTS


@dataclass(frozen=True, kw_only=True)
class Gates:
    """None: not asked. max_loss_gap_fraction: 0.01 is 1 % of the baseline's loss; the mean over seeds must not exceed it,
    with ``confident`` the upper end of Student's interval. max_spikes: of any run. verdicts: those that pass."""

    max_loss_gap_fraction: float | None = None
    confident: bool = False
    max_spikes: int | None = None
    verdicts: Sequence[str] | None = None

    def __post_init__(self) -> None:
        limit = self.max_loss_gap_fraction
        # Not limit > -1: a gap below -100 % cannot be, and nan is no number
        if limit is not None and not -1 < limit < 10:
            raise ValueError(
                f"gate.max_loss_gap_fraction={limit!r}: a share of the baseline's loss is meant, for example 0.01"
            )
        if self.max_spikes is not None and self.max_spikes < 0:
            raise ValueError(f"gate.max_spikes={self.max_spikes!r}: must be 0 or more")
        unknown = [v for v in self.verdicts or [] if v not in VERDICTS]
        if unknown:
            raise ValueError(
                f"gate.verdicts: {', '.join(map(str, unknown))} is none of {', '.join(VERDICTS)}"
            )

    @property
    def asked(self) -> bool:
        return any(g is not None for g in (self.max_loss_gap_fraction, self.max_spikes, self.verdicts))


def failures(comparison: Comparison, gates: Gates) -> list[str]:
    """A sentence for each gate that an arm or a run does not pass. What cannot be measured does not pass."""
    found = []
    for result in comparison.arms:
        limit = gates.max_loss_gap_fraction
        gap = result.gap_fraction
        if limit is not None and gap is not None:
            value = gap.high if gates.confident else gap.mean
            which = (
                f"the upper end of its gap's {comparison.confidence:.0%} interval"
                if gates.confident
                else "its gap"
            )
            if value is None:
                found.append(f"{result.label}: {which} is not known from {gap.n} pairs of completed runs")
            elif value > limit:
                found.append(
                    f"{result.label}: {which} is {value:+.2%} of the baseline's loss, the gate is {limit:+.2%}"
                )
        for seed, health in result.health.items():
            if gates.verdicts is not None and health.verdict not in gates.verdicts:
                found.append(f"{result.label} seed {seed} is {health.sentence}")
            if gates.max_spikes is not None and result.spikes[seed] > gates.max_spikes:
                found.append(
                    f"{result.label} seed {seed}: loss spikes: {result.spikes[seed]}, the gate is {gates.max_spikes}"
                )
    if gates.asked:
        found += [f"{run.folder}: {run.problem}" for run in comparison.unreadable]
        if len(comparison.arms) < 2 and gates.max_loss_gap_fraction is not None:
            found.append("there is no arm beside the baseline")
    return found
