"""The ladder on one page: ladder.md for whoever decides, ladder.png, and ladder.json with every number of both."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .ladder import ADOPT, HOLD, NOT_YET, Rung, Thresholds, recommended

PAGE, PICTURE, NUMBERS = "ladder.md", "ladder.png", "ladder.json"
COLORS = {ADOPT: "#2e7d32", HOLD: "#b26a00", NOT_YET: "#b71c1c", "reference": "#1f4e79"}


def _gap(rung: Rung) -> str:
    gap = rung.gap
    if gap is None:
        return "0"
    if gap.mean is None:
        return "?"
    if gap.low is None or gap.high is None:
        return f"{gap.mean:+.2f} (1 seed)"
    return f"{gap.mean:+.2f} ({gap.low:+.2f} .. {gap.high:+.2f})"


def _number(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)


def _of_runs(rung: Rung) -> str:
    unsound = len({run.folder for run, _ in rung.left_out})
    return f"{len(rung.runs)}" + (f" (+{unsound} left out)" if unsound else "")


def _table(rungs: Sequence[Rung]) -> list[str]:
    lines = [
        "| rung | decision | seeds | loss gap, % (interval) | states, bytes a parameter | speed here | spikes | clipped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rung in rungs:
        share = None if rung.clip_share is None else 100 * rung.clip_share
        cells = [
            rung.name,
            f"**{rung.decision}**",
            _of_runs(rung),
            _gap(rung),
            _number(rung.state_bytes_per_parameter, ".2f"),
            _number(rung.speed, ".2f") + ("" if rung.speed is None else "x"),
            str(rung.spikes) if rung.runs else "?",
            _number(share, ".1f") + ("" if share is None else " %"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _advice(rungs: Sequence[Rung]) -> str:
    best = recommended(rungs)
    after = rungs[1 + (rungs.index(best) if best else 0) :]
    first = f"Go as far as **{best.name}**" if best else f"Stay with **{rungs[0].name}**"
    if not after:
        return f"{first}: every rung is adopted."
    return f"{first}. The next rung, {after[0].name}, is *{after[0].decision}*: {after[0].reasons[0]}."


def _seeds(rung: Rung) -> str:
    if rung.gap is None or not rung.gap.n:
        return ""
    shown = ", ".join(f"{value:+.2f} (seed {seed})" for seed, value in rung.gap.differences.items())
    return f" Gaps in percent: {shown}."


def _left_out(rungs: Sequence[Rung]) -> list[str]:
    lines = [f"- {run.folder} ({run.state}): {why}" for rung in rungs for run, why in rung.left_out]
    lines += [f"- {rung.name}: no run was found" for rung in rungs if not rung.runs and not rung.left_out]
    return lines or ["None: every run that was found counts."]


def _setting(rungs: Sequence[Rung]) -> str:
    run = next((run for rung in rungs for run in rung.runs.values()), None)
    if run is None:
        return "No run completed."
    tokens = run.summary["tokens"]
    return (
        f"{run.summary['parameters']:,} parameters, {tokens:,} tokens ({tokens / run.summary['parameters']:.1f} a parameter) in "
        f"{run.summary['steps']:,} steps; validation on {run.summary['data'].get('val_windows', '?')} windows. What holds at "
        "this size and length is evidence for it, and a hypothesis for a larger one."
    )


def _computed(rung: Rung) -> str:
    ways = sorted({str(run.summary.get("compute", "simulated")) for run in rung.runs.values()})
    return f" Computed: {', '.join(ways)}." if ways and rung.gap is not None else ""


def _losses(rung: Rung) -> str:
    loss, bits = rung.mean("val_loss"), rung.mean("val_bits_per_byte")
    return (
        ""
        if loss is None
        else f" Validation loss {loss:.4f} nats/token"
        + (f", {bits:.4f} bits/byte." if bits is not None else ".")
    )


def page(rungs: Sequence[Rung], limits: Thresholds, command: str) -> str:
    """ladder.md."""
    percent = f"{100 * limits.confidence:g} %"
    return "\n".join(
        [
            "# How far down in precision?",
            "",
            _advice(rungs),
            "",
            f"![gaps, states, speed]({PICTURE})",
            "",
            *_table(rungs),
            "",
            _setting(rungs),
            "",
            "## Why",
            "",
            *(
                f"- **{rung.name}**, {rung.decision}: {'; '.join([*rung.reasons, *rung.notes])}.{_losses(rung)}{_seeds(rung)}{_computed(rung)}"
                for rung in rungs
            ),
            "",
            "## Runs that do not count",
            "",
            *_left_out(rungs),
            "",
            "## How to read this",
            "",
            f"- The gap is 100 (L / L_reference - 1) between runs of the same seed; the interval is Student's, {percent}, each "
            "rung by itself.",
            f"- *adopt*: {limits.min_seeds} pairs or more, the whole interval below {limits.margin_percent:g} % (about what a "
            f"model {100 * (1 - (1 + limits.margin_percent / 100) ** (-1 / 0.076)):.0f} % smaller loses, by L ~ N^-0.076, arXiv "
            f"2001.08361), at most {limits.extra_spikes} more loss spikes and {limits.clip_share_points:g} points more clipped "
            "steps than the reference. *not yet*: the whole interval above it, or a run diverged. *hold*: everything else.",
            "- States are what the optimizer held at the end: measured, and really saved. Weights are float32 masters, 4 bytes "
            "a parameter on every rung. *Simulated* operands are rounded to their grids and multiplied in ordinary precision, "
            "which saves neither memory nor time; *native* ones are multiplied as integers.",
            "- Speed is that of these runs, relative to the reference: of this machine, with whatever else it did. Simulated "
            "quantization is slower than none, and says nothing of hardware that multiplies in low precision.",
            "- A spike is a step whose log loss lies 8 robust standard deviations above the 100 before it.",
            "",
            f"Made by `{command}`; every number is in {NUMBERS}.",
            "",
        ]
    )


def _error_bars(axes: Any, rungs: Sequence[Rung], margin: float) -> None:
    shown = []
    for y, rung in enumerate(rungs):
        gap, color = rung.gap, COLORS[rung.decision]
        if gap is None:
            axes.plot(0, y, "D", color=color, markersize=5)
            continue
        values = list(gap.differences.values())
        shown += values
        axes.plot(values, [y + 0.18] * len(values), "o", color=color, markersize=3, alpha=0.5)
        if gap.mean is None:
            axes.annotate(
                "no pair", (0, y), fontsize=8, color=color, xytext=(4, -3), textcoords="offset points"
            )
            continue
        axes.plot(gap.mean, y, "o", color=color, markersize=6)
        if gap.low is not None and gap.high is not None:
            axes.plot([gap.low, gap.high], [y, y], color=color, linewidth=2)
    # Two seeds give intervals of twelve deviations: the pairs and the margin set the range, the line runs out of it
    reach = 2.5 * max([abs(v) for v in shown if math.isfinite(v)] + [margin])
    axes.set_xlim(-reach, reach)
    axes.axvline(0, color="#404040", linewidth=0.8)
    axes.axvline(margin, color="#404040", linewidth=1, linestyle=(0, (4, 3)))
    axes.set_title(f"loss gap to {rungs[0].name}, %\n(dashed: the margin)", fontsize=9, loc="left")


def _bars(axes: Any, rungs: Sequence[Rung], values: Sequence[float | None], title: str, form: str) -> None:
    for y, (rung, value) in enumerate(zip(rungs, values, strict=True)):
        if value is not None:
            axes.barh(y, value, color=COLORS[rung.decision], height=0.5)
        label = "?" if value is None else format(value, form)
        axes.annotate(label, (value or 0, y), xytext=(4, -3), textcoords="offset points", fontsize=8)
    axes.set_xlim(0, 1.25 * max([v for v in values if v is not None] + [1e-9]))
    axes.set_title(title, fontsize=9, loc="left")


def picture(rungs: Sequence[Rung], limits: Thresholds, path: Path) -> None:
    """ladder.png: gap with its interval, bytes of optimizer states, speed; a row a rung."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.6 + 0.5 * len(rungs)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    gaps, states, speed = figure.subplots(1, 3, sharey=True, width_ratios=[2, 1, 1])
    _error_bars(gaps, rungs, limits.margin_percent)
    held = [rung.state_bytes_per_parameter for rung in rungs]
    _bars(states, rungs, held, "optimizer states,\nbytes a parameter", ".2f")
    _bars(speed, rungs, [rung.speed for rung in rungs], "speed of these runs", ".2f")
    gaps.set_yticks(range(len(rungs)), [f"{rung.name}\n{rung.decision}" for rung in rungs], fontsize=8)
    for label, rung in zip(gaps.get_yticklabels(), rungs, strict=True):
        label.set_color(COLORS[rung.decision])
    gaps.set_ylim(len(rungs) - 0.5, -0.5)
    for axes in (gaps, states, speed):
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(axis="x", labelsize=8)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    figure.savefig(path, metadata={"Software": None})


def numbers(rungs: Sequence[Rung], limits: Thresholds) -> Mapping[str, Any]:
    """ladder.json."""
    return {
        "thresholds": asdict(limits),
        "rungs": [
            {
                "name": rung.name,
                "decision": rung.decision,
                "reasons": list(rung.reasons),
                "notes": list(rung.notes),
                "gap_percent": None
                if rung.gap is None
                else {
                    "by_seed": {str(k): v for k, v in rung.gap.differences.items()},
                    "mean": rung.gap.mean,
                    "low": rung.gap.low,
                    "high": rung.gap.high,
                },
                "val_loss": rung.mean("val_loss"),
                "state_bytes_per_parameter": rung.state_bytes_per_parameter,
                "relative_speed": rung.speed,
                "spikes": rung.spikes,
                "clip_share": rung.clip_share,
                "runs": [str(run.folder) for run in rung.runs.values()],
                "left_out": [
                    {"run": str(run.folder), "state": run.state, "why": why} for run, why in rung.left_out
                ],
            }
            for rung in rungs
        ],
    }


def write_ladder(rungs: Sequence[Rung], limits: Thresholds, folder: Path, command: str) -> None:
    """The three files, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{PICTURE}.partial.png"
    picture(rungs, limits, partial)
    partial.replace(folder / PICTURE)
    texts = {NUMBERS: json.dumps(numbers(rungs, limits), indent=1) + "\n", PAGE: page(rungs, limits, command)}
    for name, text in texts.items():
        partial = folder / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)
