"""loss.png: training and validation loss over tokens, with the lines that they are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TRAIN, VAL, REFERENCE = "#9db7d5", "#1f4e79", ("#c0504d", "#7f7f7f")
# The training curve is drawn as it is and as a running mean over this share of the run: single steps are noise.
SMOOTHED_SHARE = 0.02


def _running_mean(y: np.ndarray, width: int) -> np.ndarray:
    """Mean of the last ``width`` points (fewer at the start)."""
    total = np.cumsum(np.insert(y, 0, 0.0))
    last = np.arange(1, len(y) + 1)
    first = np.maximum(last - width, 0)
    return (total[last] - total[first]) / (last - first)


def plot_losses(
    rows: Sequence[Mapping[str, Any]], lines: Mapping[str, float], title: str, subtitle: str, path: Path
) -> None:
    """rows: of metrics.jsonl. lines: label -> nats per token, drawn across. Writes a PNG to ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = np.array([(r["tokens"], r["loss"]) for r in rows if r["kind"] == "train"]).reshape(-1, 2)
    val = np.array([(r["tokens"], r["val_loss"]) for r in rows if r["kind"] == "val"]).reshape(-1, 2)
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    most = max([*train[:, 0], *val[:, 0]], default=1.0)
    unit, suffix = (
        (1e9, "billion ") if most >= 1e9 else (1e6, "million ") if most >= 1e6 else (1e3, "thousand ")
    )
    axes.plot(train[:, 0] / unit, train[:, 1], color=TRAIN, linewidth=0.7, alpha=0.6)
    mean = _running_mean(train[:, 1], max(1, round(SMOOTHED_SHARE * len(train))))
    axes.plot(train[:, 0] / unit, mean, color=TRAIN, linewidth=1.8, label="training")
    axes.plot(
        val[:, 0] / unit, val[:, 1], color=VAL, linewidth=1.8, marker="o", markersize=3.5, label="validation"
    )
    styles = zip(lines.items(), (*REFERENCE, *REFERENCE), strict=False)
    for (label, value), color in styles:
        axes.axhline(value, color=color, linewidth=1.2, linestyle=(0, (5, 3)), label=f"{label} {value:.3f}")
    _limits(axes, np.concatenate([mean, val[:, 1]]), list(lines.values()))
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{suffix}tokens")
    axes.set_ylabel("loss (nats per token)")
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    axes.set_title(subtitle, fontsize=9, loc="left", color="#404040")
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    figure.savefig(path, metadata={"Software": None})


def _limits(axes: Any, losses: np.ndarray, references: list[float]) -> None:
    """The range of the curves without the first steep steps, where that hides the rest, and of the references."""
    finite = losses[np.isfinite(losses)]
    if not len(finite):
        return
    low = min([float(finite.min()), *references])
    high = max([float(np.percentile(finite, 97)), *references])
    margin = 0.08 * max(high - low, 0.1)
    axes.set_ylim(low - margin, high + 2 * margin)
