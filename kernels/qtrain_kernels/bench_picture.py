"""The benchmark's rows as one picture: a group of bars a workload, each a share of the machine's measured roof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOF = ("copy", "bf16 peak")  # first words of the roof's rows
BAR = 0.22  # inches of height


def shares(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, float, str]]:
    """(workload, contender, percent of its roof, the roof) of each contender that ran: of the peak where the workload
    counts operations, else of the copy."""
    found = []
    for row in rows:
        if row["contender"].startswith(ROOF) or row["missing"]:
            continue
        of_peak = row["percent_of_peak"] is not None
        percent = row["percent_of_peak"] if of_peak else row["percent_of_copy"]
        label = f"{row['op']} {row['workload']}"
        found.append((label, row["contender"], percent, row["peak"] if of_peak else "copy"))
    return found


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes ``path`` (PNG), whole or not at all. Raises ModuleNotFoundError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--png needs matplotlib: pip install matplotlib", name="matplotlib"
        ) from error
    bars = shares(rows)
    contenders = list(dict.fromkeys(name for _, name, _, _ in bars))
    figure = Figure(figsize=(10, 1.2 + BAR * len(bars)), layout="constrained")
    axes = figure.subplots()
    labels = []
    for i, (workload, name, percent, roof) in enumerate(bars):
        first = i == 0 or bars[i - 1][0] != workload
        labels.append(f"{workload} (of {roof})   {name}" if first else name)
        axes.barh(i, percent, color=f"C{contenders.index(name) % 10}")
        axes.text(percent, i, f" {percent:.0f}", va="center", fontsize=7)
    axes.set_yticks(range(len(bars)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(100, color="gray", linewidth=0.8)
    axes.set_xlabel("percent of the roof that was measured in the same run")
    axes.set_title(f"{rows[0]['device']}, torch {rows[0]['torch']}, triton {rows[0]['triton']}", fontsize=9)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=130)
    temporary.replace(path)
