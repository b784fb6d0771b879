"""The stability study's results as text: what stands between the markers of docs/stability_study.md."""

from __future__ import annotations

from collections.abc import Sequence

from stability_arms import ARMS
from study_page import provenance, row
from study_runs import PLACEBO, Run

from qtrain.analysis.comparison import ArmResult, Comparison
from qtrain.analysis.comparison_table import COLUMNS, table_rows

SCRIPT = "reproduce_stability.sh"
_BY_NAME = {arm.name: arm for arm in ARMS}


def surprises(comparison: Comparison) -> list[str]:
    """A sentence for each run whose verdict was not foreseen, and one for a placebo that was told from the baseline."""
    found = []
    for result in comparison.arms:
        arm = _BY_NAME[result.label]
        for seed, health in result.health.items():
            if health.verdict not in arm.expected:
                found.append(
                    f"{arm.name} seed {seed}: {health.sentence} (foreseen: {' or '.join(arm.expected)})"
                )
        if arm.name == PLACEBO and told_apart(result):
            found.append(f"{arm.name}: its interval over seeds leaves out a gap of 0")
    return found


def told_apart(result: ArmResult) -> bool:
    """Whether the interval over seeds leaves out 0; False where there is none."""
    gap = result.gap
    return gap is not None and gap.low is not None and gap.high is not None and not gap.low <= 0 <= gap.high


def _table(comparison: Comparison) -> list[str]:
    lines = [row((*COLUMNS[:2], "foreseen", *COLUMNS[2:])), row(["---"] * (len(COLUMNS) + 1))]
    for cells in table_rows(comparison):
        arm = _BY_NAME[cells[0]]
        shown = [f"{arm.label} (`{arm.name}`)", cells[1], " or ".join(arm.expected), *cells[2:]]
        lines.append(row([cell.replace("\n", "; ") for cell in shown]))
    return lines


def _verdicts(comparison: Comparison) -> list[str]:
    """The sentence of every run that is not healthy."""
    found = [
        f"- `{result.label}` seed {seed}: {health.sentence}"
        for result in comparison.arms
        for seed, health in result.health.items()
        if health.verdict != "healthy"
    ]
    return found or ["All runs are healthy."]


def section(comparison: Comparison, runs: Sequence[Run], settings: Sequence[str]) -> str:
    """The markdown between the markers."""
    unforeseen = surprises(comparison)
    judged = sum(len(result.health) for result in comparison.arms)
    seeds = len(comparison.baseline.health)
    notes = [
        "Gaps are in percent of the baseline's validation loss, between runs of one seed; intervals are of "
        f"{comparison.confidence:.0%}. {seeds} seeds bring the two-sided sign test to p = {2 * 0.5**seeds:.2g} at best.",
        f"{judged - sum(' seed ' in line for line in unforeseen)} of {judged} verdicts are ones that were foreseen."
        + "".join(f"\n- {line}" for line in unforeseen),
    ]
    blocks = [
        _table(comparison),
        notes,
        ["What the verdicts say of runs that are not healthy:", "", *_verdicts(comparison)],
        provenance(SCRIPT, runs, settings),
    ]
    return "\n\n".join("\n".join(block) for block in blocks)
