"""comparison.png and comparison.pdf: validation loss over tokens with a band over seeds, and the gaps with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .comparison import ArmResult, Comparison
from .curves import Array
from .health import DIVERGED

# Okabe and Ito's colours, told apart by most colour-blind readers; the baseline is black
COLORS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# Of the second round of colours, and of the third and fourth; plotly calls them otherwise
MARKERS = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond"}
# Gaps beyond this, in percent, are drawn on a logarithmic axis, so that they leave room for the others
_LINEAR_PERCENT = 1.0
_WIDE_PERCENT = 5.0
# Names in one column of a legend over the curves; more of them stand below
_LEGEND_INSIDE = 8
# More arms than this are a crowd: the picture shows the baseline and the first of the others, the page all
MOST_ARMS = 20


def color(number: int) -> str:
    """Of the arm at this place of ``Comparison.arms``."""
    return COLORS[0] if number == 0 else COLORS[1 + (number - 1) % (len(COLORS) - 1)]


def marker(number: int) -> str:
    """Of the arm at this place: with the colour, of the first 25 arms no two look alike."""
    return list(MARKERS)[max(number - 1, 0) // (len(COLORS) - 1) % len(MARKERS)]


def _text(label: str) -> str:
    """Of a name that is no formula."""
    return label.replace("$", r"\$")


def band(result: ArmResult, *, sound: bool = True) -> tuple[Array, Array, Array, Array]:
    """(tokens, mean, low, high) of the validation loss over the arm's runs, at the tokens that all of them have been
    evaluated at; sound: without those that diverged, where there are others."""
    runs = [run for run in result.arm.runs.values() if len(run.curves.val_loss)]
    good = [r for s, r in result.arm.runs.items() if result.health[s].verdict != DIVERGED and r in runs]
    runs = good if sound and good else runs
    if not runs:
        return (np.array([]),) * 4
    at = runs[0].curves.val_tokens
    for run in runs[1:]:
        at = np.intersect1d(at, run.curves.val_tokens)
    losses = np.array([[run.curves.val_loss[run.curves.val_tokens == t][-1] for t in at] for run in runs])
    return at, losses.mean(axis=0), losses.min(axis=0), losses.max(axis=0)


def loss_limits(comparison: Comparison) -> tuple[float, float] | None:
    """The range of validation losses to show: that of the arms that did not diverge."""
    shown = [band(r) for r in comparison.arms if r.gap is None or r.gap.n]
    finite = np.concatenate(
        [v[np.isfinite(v)] for *_, low, high in shown for v in (low, high)] or [np.array([])]
    )
    if not len(finite):
        return None
    # Without the steep start, where that hides the rest
    low, high = float(finite.min()), float(np.percentile(finite, 97))
    margin = 0.06 * max(high - low, 0.05)
    return low - margin, high + margin


def unit(most: float) -> tuple[float, str]:
    """(size, its name) for an axis of tokens."""
    return (1e9, "billion ") if most >= 1e9 else (1e6, "million ") if most >= 1e6 else (1e3, "thousand ")


def _curves(axes: Any, comparison: Comparison) -> None:
    most = max(
        (
            float(run.curves.tokens[-1])
            for r in comparison.arms
            for run in r.arm.runs.values()
            if len(run.curves)
        ),
        default=1.0,
    )
    size, name = unit(most)
    for number, result in enumerate(comparison.arms[:MOST_ARMS]):
        at, mean, low, high = band(result)
        if not len(at):
            continue
        axes.fill_between(at / size, low, high, color=color(number), alpha=0.15, linewidth=0)
        style = "-" if result.gap is None or result.gap.n else (0, (4, 2))
        axes.plot(
            at / size,
            mean,
            color=color(number),
            linewidth=1.6,
            linestyle=style,
            label=_text(result.label),
            marker=marker(number),
            markersize=3.0,
        )
    limits = loss_limits(comparison)
    if limits is not None:
        axes.set_ylim(*limits)
    axes.set_xlabel(f"{name}tokens", fontsize=8)
    axes.set_title("validation loss, nats a token\n(band: least to most over seeds)", fontsize=9, loc="left")
    if len(comparison.arms) <= _LEGEND_INSIDE:
        axes.legend(frameon=False, fontsize=7, loc="upper right")
    else:
        axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.09), ncols=4)


def _forest(axes: Any, results: Sequence[tuple[int, ArmResult]], confidence: float) -> None:
    ends_shown = [0.0]
    for y, (number, result) in enumerate(results):
        gap, shade = result.gap_fraction, color(number)
        if gap is None or gap.mean is None:
            why = (
                f"{result.unstable[0]} of {result.unstable[1]} runs went wrong"
                if result.unstable[0]
                else "no pair"
            )
            axes.annotate(why, (0, y), fontsize=8, color=shade, xytext=(4, -3), textcoords="offset points")
            continue
        for k, (seed, value) in enumerate(gap.differences.items()):
            place = y + 0.16 + 0.3 * k / max(gap.n, 3)
            if seed in result.windows:
                base = result.tokens_to_target[seed].target
                ends = [100 * v / base for v in result.windows[seed][1:]]
                axes.plot(ends, [place, place], color=shade, linewidth=1, alpha=0.6)
                ends_shown += ends
            axes.plot(100 * value, place, ".", color=shade, markersize=4, alpha=0.8)
            ends_shown.append(100 * value)
        axes.plot(100 * gap.mean, y, marker(number), color=shade, markersize=5)
        if gap.low is not None and gap.high is not None:
            axes.plot([100 * gap.low, 100 * gap.high], [y, y], color=shade, linewidth=2.2)
    _set_range(axes, min(ends_shown), max(ends_shown))
    axes.axvline(0, color="#404040", linewidth=0.8)
    axes.set_yticks(range(len(results)), [_text(r.label) for _, r in results], fontsize=8)
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.set_title(
        f"gap to the baseline, % of its loss\n(thick: {confidence:.0%} over seeds; thin: each seed, over windows)",
        fontsize=9,
        loc="left",
    )


def _set_range(axes: Any, low: float, high: float) -> None:
    """low, high: of the seeds, which set the range: the interval of two is twelve deviations wide, and runs out of it."""
    if max(-low, high) <= _WIDE_PERCENT:
        margin = 0.75 * (high - low or 1.0)
        axes.set_xlim(low - margin, high + margin)
        return
    axes.set_xscale("symlog", linthresh=_LINEAR_PERCENT, linscale=1.0)
    axes.set_xlim(min(2.5 * low, -_LINEAR_PERCENT), max(2.5 * high, _LINEAR_PERCENT))
    left, right = axes.get_xlim()
    ticks = [t for t in (-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100) if left <= t <= right]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()


def draw(comparison: Comparison) -> Any:
    """The matplotlib figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    others = list(enumerate(comparison.arms))[1:MOST_ARMS]
    figure = Figure(figsize=(10, max(3.6, 1.4 + 0.45 * len(others))), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    curves, forest = figure.subplots(1, 2)
    _curves(curves, comparison)
    _forest(forest, others, comparison.confidence)
    hidden = len(comparison.arms) - MOST_ARMS
    title = f"{len(comparison.arms)} arms against {_text(comparison.baseline.label)}"
    figure.suptitle(
        title + (f" ({hidden} more arms are on the page)" if hidden > 0 else ""),
        fontsize=10,
        x=0.01,
        ha="left",
    )
    for axes in (curves, forest):
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure


def save(comparison: Comparison, path: Path) -> None:
    """As the name's end says: .png or .pdf. Whole or not at all."""
    partial = path.with_name(f".partial-{path.name}")
    metadata = (
        {"Software": None}
        if path.suffix == ".png"
        else {"Creator": None, "Producer": None, "CreationDate": None}
    )
    draw(comparison).savefig(partial, metadata=metadata)
    partial.replace(path)
