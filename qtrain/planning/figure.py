"""A plan as a picture: stacked bars of memory and of time, a bar a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .devices import GIB
from .plan import Inputs, RunPlan
from .report import memory_rows


def save(inputs: Inputs, plans: Sequence[RunPlan], path: Path) -> None:
    """A PNG, whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(5 + 2.2 * len(plans), 5), constrained_layout=True)
    memory = [{kind: nbytes / GIB for kind, nbytes in memory_rows(p)} for p in plans]
    time = [{k: v * 1e3 for k, v in p.time.parts.items()} for p in plans]
    for axes, bars, unit in ((left, memory, "GiB a GPU, at the peak"), (right, time, "ms a step")):
        bottom = [0.0] * len(plans)
        for i, part in enumerate(dict.fromkeys(part for bar in bars for part in bar)):
            heights = [max(0.0, bar.get(part, 0.0)) for bar in bars]
            color = pyplot.get_cmap("tab20")(i % 20)
            axes.bar([p.name for p in plans], heights, bottom=bottom, label=part, color=color)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        axes.set_ylabel(unit)
        axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
        axes.tick_params(axis="x", labelrotation=20)
    left.axhline(inputs.usable_bytes / GIB, color="black", linestyle="--", linewidth=1)
    left.set_title(
        f"{inputs.device.name}: {inputs.usable_bytes / GIB:.0f} GiB usable (dashed)", fontsize="medium"
    )
    right.set_title(f"{inputs.gpus} GPU(s), {inputs.strategy}", fontsize="medium")
    partial = path.with_name(f".{path.name}.partial.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(partial, dpi=120)
    pyplot.close(figure)
    partial.replace(path)
