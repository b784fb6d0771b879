"""The study's results as text and picture: what stands between the markers of docs/optimizer_states.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from optimizer_states_arms import ARMS
from optimizer_states_claims import ArmResult, Gap, Interval, Verdict, gap_between
from study_page import provenance, row
from study_runs import BASELINE, Run

from qtrain.training.callbacks.metrics_jsonl import read_metrics
from qtrain.training.run_folder import SUMMARY, WINDOW_LOSSES

SCRIPT = "reproduce_optimizer_states.sh"
SMOOTHED_STEPS = 10


def read_results(runs: Sequence[Run]) -> dict[str, ArmResult]:
    """arm -> what its runs, which have all ended, found. Raises ValueError where windows differ between runs."""
    results = {}
    for arm in dict.fromkeys(run.arm.name for run in runs):
        mine = [run for run in runs if run.arm.name == arm]
        rows = [np.load(r.folder / WINDOW_LOSSES) if r.outcome == "completed" else None for r in mine]
        counts = {len(losses) for losses in rows if losses is not None}
        if len(counts) > 1:
            raise ValueError(
                f"the runs of {arm} were validated on {sorted(counts)} windows; run them anew alike"
            )
        windows = np.full((len(mine), *(counts or {0})), np.nan)
        for i, losses in enumerate(rows):
            if losses is not None:
                windows[i] = losses
        results[arm] = ArmResult(np.array([r.val_loss for r in mine]), windows)
    return results


def _interval(interval: Interval, digits: int) -> str:
    return f"[{interval[0]:+.{digits}f}, {interval[1]:+.{digits}f}]"


def _gap_cells(gap: Gap, digits: int) -> list[str]:
    return [f"{gap.mean:+.{digits}f}", _interval(gap.over_seeds, digits), _interval(gap.over_windows, digits)]


def claims_table(verdicts: Sequence[Verdict]) -> list[str]:
    lines = [
        "| claim | expected | measured | seeds (95 %) | windows (95 %) | seeds that agree | |",
        "|---|---|---|---|---|---|---|",
    ]
    for v in verdicts:
        agree = f"{v.agree} of {len(v.gap.per_seed)}, p = {v.p:.3f}"
        cells = [v.claim.text, v.claim.expected(), *_gap_cells(v.gap, 3), agree, f"**{v.outcome}**"]
        lines.append(row(cells))
    return lines


def arms_table(results: Mapping[str, ArmResult], runs: Sequence[Run]) -> list[str]:
    lines = [
        "| arm | validation loss | gap | seeds (95 %) | windows (95 %) | gap of each seed | moments, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        result = results[arm.name]
        gap = gap_between(result, results[BASELINE])
        of_baseline = ["0", "", "", ""]
        cells = (
            of_baseline
            if arm.name == BASELINE
            else [*_gap_cells(gap, 4), " ".join(f"{g:+.4f}" for g in gap.per_seed)]
        )
        lines.append(row([arm.label, f"{result.val_losses.mean():.4f}", *cells, _moments(runs, arm.name)]))
    return lines


def _moments(runs: Sequence[Run], arm: str) -> str:
    for run in runs:
        if run.arm.name == arm and run.outcome == "completed":
            held = json.loads((run.folder / SUMMARY).read_text(encoding="utf-8"))["optimizer_state_bytes"]
            return f"{held['total'] / 1e6:.2f}"
    return ""


def section(
    results: Mapping[str, ArmResult],
    verdicts: Sequence[Verdict],
    runs: Sequence[Run],
    settings: Sequence[str],
) -> str:
    """The markdown between the markers."""
    seeds = len(results[BASELINE].val_losses)
    spread = results[BASELINE].val_losses.std(ddof=1) if seeds > 1 else float("nan")
    notes = [
        f"Gaps are in nats a token unless % is written. {seeds} seeds can bring the one-sided sign test to p = "
        f"{verdicts[0].least_p:.3f} at best (two-sided {min(1.0, 2 * verdicts[0].least_p):.3f}): it decides nothing here, and "
        "the two intervals do.",
        f"The baseline's loss has a standard deviation of {spread:.4f} over seeds; gaps are between runs of one seed.",
    ]
    blocks = [claims_table(verdicts), notes, arms_table(results, runs), provenance(SCRIPT, runs, settings)]
    return "\n\n".join("\n".join(block) for block in blocks)


def _curve(run: Run) -> np.ndarray:
    """Training loss of each step, a running mean of SMOOTHED_STEPS: [steps - SMOOTHED_STEPS + 1]."""
    losses = [row["loss"] for row in read_metrics(run.folder / "metrics.jsonl") if row["kind"] == "train"]
    return np.convolve(losses, np.full(SMOOTHED_STEPS, 1 / SMOOTHED_STEPS), mode="valid")


def draw(results: Mapping[str, ArmResult], runs: Sequence[Run], path: Path) -> None:
    """Left: the gap of every arm with its intervals. Right: the training losses of those that quantize m2."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    figure.suptitle(
        "Adam's moments and activations in few bits: a byte model of 0.87 M parameters, 200 steps",
        x=0.01,
        ha="left",
    )
    _draw_gaps(left, results)
    _draw_curves(right, runs)
    for axes in (left, right):
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})


def _draw_gaps(axes: Any, results: Mapping[str, ArmResult]) -> None:
    arms = [arm for arm in ARMS if arm.name != BASELINE]
    for y, arm in enumerate(arms):
        gap = gap_between(results[arm.name], results[BASELINE])
        for interval, width, color in ((gap.over_seeds, 1.4, "#1f4e79"), (gap.over_windows, 5.0, "#9db7d5")):
            axes.plot(
                interval,
                (y, y),
                color=color,
                linewidth=width,
                solid_capstyle="butt",
                zorder=1 if width > 2 else 2,
            )
        axes.plot(gap.per_seed, [y] * len(gap.per_seed), "o", color="#c0504d", markersize=4, zorder=3)
    axes.axvline(0, color="#404040", linewidth=1)
    axes.axvline(0.2, color="#7f7f7f", linewidth=1, linestyle=(0, (5, 3)))
    axes.set_xscale("symlog", linthresh=0.03, linscale=1.5)
    ticks = [-0.03, -0.01, 0, 0.01, 0.03, 0.1, 0.2, 0.5, 1, 10, 100]
    low, high = axes.get_xlim()
    axes.set_xticks(
        [t for t in ticks if low <= t <= high], [f"{t:g}" for t in ticks if low <= t <= high], rotation=45
    )
    axes.minorticks_off()
    axes.set_yticks(range(len(arms)), [arm.label for arm in arms])
    axes.invert_yaxis()
    axes.set_xlabel(
        "gap of the validation loss to the float32 baseline, nats per token (linear within 0.03, then logarithmic)"
    )
    axes.xaxis.label.set_fontsize(8)
    axes.set_title(
        "dots: seeds   thin: 95 % over seeds   thick: 95 % over windows   dashed: 0.2 nats",
        fontsize=8,
        loc="left",
    )


def _draw_curves(axes: Any, runs: Sequence[Run]) -> None:
    shown = [arm for arm in ARMS if arm.name == BASELINE or (arm.name.startswith("m2_") and arm.claimed)]
    colors = ("#000000", "#c0504d", "#e08e3c", "#1f4e79", "#8064a2", "#4f9153")
    final = []
    for arm, color in zip(shown, colors, strict=True):
        curves = [_curve(run) for run in runs if run.arm.name == arm.name and run.outcome == "completed"]
        if not curves:
            continue
        steps = np.arange(SMOOTHED_STEPS, SMOOTHED_STEPS + len(curves[0]))
        mean = np.mean(curves, axis=0)
        axes.fill_between(
            steps, np.min(curves, axis=0), np.max(curves, axis=0), color=color, alpha=0.2, linewidth=0
        )
        dashes = (0, (4, 2)) if arm.name in ("m2_dynamic8", "m2_linear4_nozero") else "-"
        axes.plot(steps, mean, color=color, linewidth=1.6, linestyle=dashes, label=arm.label)
        final.append(mean[-1])
    axes.set_ylim(min(final) - 0.15, min(max(final) + 1.5, 6.0))
    axes.set_xlabel("optimizer steps, 2048 tokens each")
    axes.set_ylabel("training loss, nats per token")
    axes.set_title(
        f"mean of {SMOOTHED_STEPS} steps; bands: least to greatest of the seeds", fontsize=8, loc="left"
    )
    axes.legend(frameon=False, fontsize=8)
