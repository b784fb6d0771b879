"""A comparison as rows of text and as numbers: what the terminal, the page, comparison.json and W&B's table show."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .comparison import ArmResult, Comparison
from .curves import Operand
from .health import VERDICTS, Health

COLUMNS = (
    "arm",
    "verdicts",
    "val loss",
    "gap, % (over seeds)",
    "seeds worse, p",
    "gap, % (over windows)",
    "extra tokens",
    "spikes",
    "unstable",
    "tokens/s",
    "states, MB",
    "lowest SQNR",
)
# Those that a narrow terminal has room for
FEW_COLUMNS = ("arm", "verdicts", "val loss", "gap, % (over seeds)", "seeds worse, p")
UNKNOWN = "?"


def _signed_percent(value: float) -> str:
    return f"{100 * value:+.2f}"


def verdict_counts(health: Mapping[int, Health]) -> str:
    """``2 healthy, 1 diverged``."""
    found = Counter(h.verdict for h in health.values())
    return ", ".join(f"{found[v]} {v}" for v in VERDICTS if found[v])


def gap_over_seeds(result: ArmResult) -> str:
    """Mean and Student's interval, in percent of the baseline's loss."""
    gap = result.gap_fraction
    if result.is_baseline or gap is None:
        return "baseline"
    if gap.mean is None:
        return "no pair"
    if gap.low is None or gap.high is None:
        return f"{_signed_percent(gap.mean)} (1 seed)"
    return f"{_signed_percent(gap.mean)} ({_signed_percent(gap.low)} .. {_signed_percent(gap.high)})"


def sign(result: ArmResult) -> str:
    test = result.sign
    if test is None or not test.positive + test.negative:
        return ""
    return f"{test.positive} of {test.positive + test.negative}, {test.p:.2g} (least {test.attainable:.2g})"


def gap_over_windows(result: ArmResult) -> str:
    """Of each seed, the bootstrap interval in percent of the baseline's loss."""
    shown = []
    for seed, (_, low, high) in result.windows.items():
        base = result.tokens_to_target[seed].target
        shown.append(f"{seed}: {_signed_percent(low / base)} .. {_signed_percent(high / base)}")
    return "\n".join(shown)


def count(value: float) -> str:
    """``81.9k``, ``1.2M``."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.0f}"


def tokens(result: ArmResult) -> str:
    """Tokens more than the baseline for its loss; where not all seeds reach that, when the baseline overtook them."""
    targets = result.tokens_to_target
    if not targets:
        return "" if result.is_baseline else UNKNOWN
    extra = result.extra_tokens
    if extra is not None:
        return f"{'+' if extra >= 0 else '-'}{count(abs(extra))}"
    reached = sum(t.reached is not None for t in targets.values())
    shown = f"reached by {reached} of {len(targets)}"
    overtaken = [t.overtaken for t in targets.values() if t.reached is None and t.overtaken is not None]
    if overtaken:
        shown += f"; its loss took the baseline {count(sum(overtaken) / len(overtaken))}"
    return shown


def sqnr(found: tuple[float, Operand, int] | None) -> str:
    if found is None:
        return ""
    db, operand, step = found
    return f"{db:.1f} dB {operand}" + (f" (step {step})" if step else "")


def table_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """A row an arm, in COLUMNS' order; cells may have several lines."""
    rows: list[tuple[str, ...]] = []
    for result in comparison.arms:
        speed, held, (unstable, judged) = result.tokens_per_s, result.state_bytes, result.unstable
        loss = result.val_loss
        rows.append(
            (
                result.label,
                verdict_counts(result.health),
                UNKNOWN if loss is None else f"{loss:.4f}",
                gap_over_seeds(result),
                sign(result),
                gap_over_windows(result),
                tokens(result),
                str(sum(result.spikes.values())),
                f"{unstable} of {judged}" if judged else UNKNOWN,
                UNKNOWN if speed is None else count(speed),
                UNKNOWN if held is None else f"{held / 1e6:.2f}",
                sqnr(result.sqnr),
            )
        )
    return rows


def headline(comparison: Comparison) -> str:
    """What the comparison says, in a sentence or two."""
    best: list[str] = []
    for result in comparison.arms[1:]:
        gap = result.gap_fraction
        unstable, judged = result.unstable
        if unstable:
            best.append(f"{result.label}: {unstable} of {judged} runs went wrong")
        elif gap is None or gap.mean is None:
            best.append(f"{result.label}: no pair of completed runs")
        elif gap.low is None or gap.high is None:
            best.append(f"{result.label}: {gap.mean:+.2%} from one seed, which tells nothing of another")
        elif gap.low > 0:
            best.append(f"{result.label} is worse, by {gap.mean:+.2%}")
        elif gap.high < 0:
            best.append(f"{result.label} is better, by {gap.mean:+.2%}")
        else:
            best.append(f"{result.label} cannot be told apart ({gap.low:+.2%} .. {gap.high:+.2%})")
    shown = best if len(best) <= 8 else [*best[:8], f"and {len(best) - 8} more arms"]
    return f"Against {comparison.baseline.label}: " + ("; ".join(shown) or "there is no other arm") + "."


def verdict_lines(comparison: Comparison) -> list[tuple[str, Health]]:
    """(arm and seed, verdict) of every run that belongs to an arm."""
    return [(f"{r.label} seed {seed}", health) for r in comparison.arms for seed, health in r.health.items()]


def notes(comparison: Comparison) -> list[str]:
    """What else a reader has to know, of all of it and arm by arm."""
    found = [*comparison.notes]
    for result in comparison.arms:
        found += [f"{result.label}: {note}" for note in result.notes]
        found += [
            f"{result.label} seed {seed} is in no average: {gap:+.4f} nats to the baseline after {count(at)} tokens of both"
            for seed, (at, gap) in result.at_common_tokens.items()
        ]
    return [*found, *(f"{run.folder}: {run.problem}" for run in comparison.unreadable)]


def plain(value: Any) -> Any:
    """Containers and numbers that JSON has; nan and inf as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def _of_gap(gap: Any) -> Any:
    if gap is None:
        return None
    return {"by_seed": dict(gap.differences), "mean": gap.mean, "low": gap.low, "high": gap.high}


def _of_run(result: ArmResult, seed: int) -> dict[str, Any]:
    run, health = result.arm.runs[seed], result.health[seed]
    target = result.tokens_to_target.get(seed)
    return {
        "folder": str(run.folder),
        "state": run.state,
        "verdict": health.verdict,
        "sentence": health.sentence,
        "evidence": list(health.evidence),
        "notes": list(health.notes),
        "first_step": health.first_step,
        "blame": None
        if health.blame is None
        else {"operand": str(health.blame.operand), "why": health.blame.why, "step": health.blame.step},
        "val_loss": run.summary.get("val_loss"),
        "steps": run.curves.last_step,
        "spikes": [int(run.curves.step[i]) for i in run.spikes],
        "clip_share": run.clip_share,
        "tokens_per_s": run.tokens_per_s,
        "gap_over_windows_nats": result.windows.get(seed),
        "tokens_to_target": None if target is None else asdict(target),
    }


def numbers(comparison: Comparison, gate_failures: Sequence[str]) -> dict[str, Any]:
    """comparison.json. Losses are nats a token, gaps of the kind that their names say."""
    return plain(
        {
            "headline": headline(comparison),
            "confidence": comparison.confidence,
            "baseline": comparison.baseline.label,
            "gate_failures": list(gate_failures),
            "notes": notes(comparison),
            "arms": [
                {
                    "label": r.label,
                    "val_loss": r.val_loss,
                    "gap_nats": _of_gap(r.gap),
                    "gap_fraction": _of_gap(r.gap_fraction),
                    "sign_test": None
                    if r.sign is None
                    else {**asdict(r.sign), "p": r.sign.p, "attainable": r.sign.attainable},
                    "extra_tokens": r.extra_tokens,
                    "spike_score_loss": r.spike_scores[0],
                    "spike_score_grad_norm": r.spike_scores[1],
                    "unstable_runs": r.unstable[0],
                    "judged_runs": r.unstable[1],
                    "tokens_per_s": r.tokens_per_s,
                    "state_bytes": r.state_bytes,
                    "lowest_sqnr_db": None if r.sqnr is None else r.sqnr[0],
                    "lowest_sqnr_operand": None if r.sqnr is None else str(r.sqnr[1]),
                    "runs": {seed: _of_run(r, seed) for seed in r.arm.runs},
                }
                for r in comparison.arms
            ],
        }
    )
