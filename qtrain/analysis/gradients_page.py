"""What ``gradient_study`` found, as a table for a terminal, as JSON, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .gradients import RecipeGradients, Statistics

COLUMNS = ("recipe", "of", "GEMM", "cosine", "alignment", "bias", "floor", "deviation", "decay", "own cosine")
# 1 - cosine of less is float32 noise: the GEMM is exact, and has no place on a logarithmic axis
_EXACT = 1e-12
COLORS = ("#1f4e79", "#c0504d", "#2e7d32", "#b26a00", "#6a3d9a", "#00838f", "#5d4037", "#7f7f7f")


def _cells(s: Statistics) -> list[str]:
    return [f"{s.cosine:.5f}", f"{s.alignment:.4f}", f"{s.bias:.4f}", f"{s.floor:.4f}", f"{s.deviation:.4f}", f"{s.decay:+.2f}"]  # fmt: skip


def table(study: Mapping[str, RecipeGradients], rows: int) -> Any:
    """A rich table: of each recipe the whole gradient, and its ``rows`` worst layers and GEMMs by their own cosine."""
    from rich.table import Table

    shown = Table(title="gradients against high precision, relative to its length")
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column in COLUMNS[:3] else "right", overflow="fold")
    for name, found in study.items():
        draws = f"{found.total.draws} draw{'s' if found.total.draws > 1 else ''}"
        whole = f"whole gradient, {draws}, loss {found.loss:.4f}"
        shown.add_row(name, whole, "", *_cells(found.total), "")
        for layer, gemm in found.worst(rows):
            own = f"{found.own[layer, gemm].cosine:.5f}"
            shown.add_row("", layer, gemm, *_cells(found.model[layer, gemm]), own)
    return shown


def as_json(study: Mapping[str, RecipeGradients]) -> dict[str, Any]:
    """recipe -> loss, total, and layers: "layer/GEMM" -> {model, own}, the fields of ``Statistics`` each."""
    return {
        name: {
            "loss": found.loss,
            "total": asdict(found.total),
            "layers": {
                f"{layer}/{gemm}": {
                    "model": asdict(found.model[layer, gemm]),
                    "own": asdict(found.own[layer, gemm]),
                }
                for layer, gemm in found.own
            },
        }
        for name, found in study.items()
    }


def picture(study: Mapping[str, RecipeGradients], title: str, path: Path) -> None:
    """A PNG: how the error of the whole gradient shrinks as draws are averaged, and where it comes from."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    decay, blame = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1, 1.6)})
    layers = list(
        dict.fromkeys(
            layer
            for found in study.values()
            for (layer, gemm), s in found.own.items()
            if gemm != "fprop" and s.cosine < 1 - _EXACT
        )
    )
    for i, (name, found) in enumerate(study.items()):
        color = COLORS[i % len(COLORS)]
        curve = [(n, e2) for n, e2 in found.total.decay_curve if e2 > 0]
        most = max(s.total.draws for s in study.values())
        if len(curve) == 1 and most > 1:  # deterministic: every draw is the same
            curve.append((most, curve[0][1]))
        if curve:
            decay.plot(*zip(*curve, strict=True), color=color, marker="o", markersize=4, label=name)
            decay.plot(
                [1, most], [curve[0][1], curve[0][1] / most], color=color, linewidth=0.8, linestyle=":"
            )
        for gemm, marker in (("dgrad", "o"), ("wgrad", "^")):
            points = [
                (layers.index(layer), 1 - s.cosine)
                for (layer, g), s in found.own.items()
                if g == gemm and s.cosine < 1 - _EXACT
            ]
            if points:
                blame.plot(
                    *zip(*points, strict=True),
                    marker,
                    color=color,
                    markersize=5,
                    alpha=0.8,
                    label=f"{name}, {gemm}",
                )
    decay.set_xscale("log", base=2)
    decay.set_xlabel("draws averaged (dotted: 1/N)")
    decay.set_ylabel("squared error / squared length")
    decay.set_title("whole gradient", loc="left", fontsize=10)
    blame.set_xticks(range(len(layers)), layers, rotation=90, fontsize=6)
    blame.set_ylabel("1 - cosine, of each layer alone")
    blame.set_title("where it comes from (layers that err)", loc="left", fontsize=10)
    for axes in (decay, blame):
        if axes.lines:
            axes.set_yscale("log")
            axes.legend(frameon=False, fontsize=7)
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    figure.savefig(path, metadata={"Software": None})
