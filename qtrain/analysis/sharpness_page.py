"""What ``sharpness`` found of several checkpoints and recipes, as a table, as JSON, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .sharpness import CONVERGED, MSharpness, TopEigenvalue


@dataclass(frozen=True)
class Sharpness:
    """Of one checkpoint under one recipe."""

    run: str
    recipe: str
    sharpness: MSharpness
    eigenvalue: TopEigenvalue


def table(found: Sequence[Sharpness]) -> Any:
    """A rich table."""
    from rich.table import Table

    shown = Table(title="sharpness of the loss, nats per token")
    for column in (
        "run",
        "recipe",
        "loss",
        "m-sharpness",
        "radius",
        "top eigenvalue",
        "residual",
        "Hessian by",
    ):
        shown.add_column(column, justify="left" if column in ("run", "recipe", "Hessian by") else "right", overflow="fold")  # fmt: skip
    for one in found:
        m, top = one.sharpness, one.eigenvalue
        residual = f"{top.residual:.1e}" + (
            "" if top.residual < 10 * CONVERGED else f" after {top.iterations}"
        )
        shown.add_row(
            one.run, one.recipe, f"{m.loss:.4f}", f"{m.mean:.4f}", f"{m.radius:.3f}", f"{top.value:.4g}", residual, top.method
        )  # fmt: skip
    return shown


def as_json(found: Sequence[Sharpness]) -> list[dict[str, Any]]:
    return [asdict(one) for one in found]


def picture(found: Sequence[Sharpness], title: str, path: Path) -> None:
    """A PNG: two bars for each checkpoint and recipe. Eigenvalues are compared within one kind: the bars say which."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.4 * len(found)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    places = range(len(found))
    for axes, label, values, color in (
        (panels[0], "m-sharpness (nats per token)", [one.sharpness.mean for one in found], "#1f4e79"),
        (panels[1], "top eigenvalue of the Hessian", [one.eigenvalue.value for one in found], "#c0504d"),
    ):
        bars = axes.barh(places, values, color=color, height=0.6)
        if axes is panels[1]:
            kinds = [f" {one.eigenvalue.method.replace('_', ' ')} " for one in found]
            axes.bar_label(bars, kinds, fontsize=7)
            axes.margins(x=0.45)
        axes.set_xlabel(label)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].set_yticks(places, [f"{one.run}\n{one.recipe}" for one in found], fontsize=8)
    panels[0].invert_yaxis()
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    figure.savefig(path, metadata={"Software": None})
