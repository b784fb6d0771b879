"""qtrain compare: hold runs against a baseline: gaps with intervals, stability, a verdict on each run, gates.

    qtrain compare runs=[outputs/baseline,outputs/w4a4]
    qtrain compare 'runs=[outputs/*/seed*]' baseline=baseline gate.max_loss_gap_fraction=0.01 gate.verdicts=[healthy,noisy]

Arms are runs that differ in their seed alone. Exit codes: 0, 1 where a gate does not pass, 2 where the runs cannot be
compared.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from .train import plain

CONFIG = "compare"
POSITIONAL = "runs"
_WIDE = 170  # columns of a terminal that all columns of the table need
NUMBERS, PAGE, PICTURES = "comparison.json", "comparison.html", ("comparison.png", "comparison.pdf")


def _runs(config: dict[str, Any]) -> list[str]:
    runs = config["runs"]
    return [runs] if isinstance(runs, str) else list(runs)


def check(cfg: DictConfig) -> None:
    """Raises ValueError for runs that are not there, gates that cannot be, a page without plotly, and a report without a server."""
    from qtrain.analysis.comparison_page import check_page
    from qtrain.analysis.gates import Gates
    from qtrain.analysis.run_sources import places

    config = plain(cfg)
    Gates(**config["gate"])
    if not 0 < config["confidence"] < 1:
        raise ValueError(f"confidence={config['confidence']!r}: must lie between 0 and 1, for example 0.95")
    places(_runs(config))
    if config["html"]:
        check_page()
    if config["wandb_report"]:
        from qtrain.analysis.comparison_wandb import check_report
        from qtrain.training.wandb_logger import resolved_mode

        check_report(logs=config["wandb"], mode=resolved_mode(config["wandb_mode"]))


def _command(config: dict[str, Any]) -> str:
    words = [f"runs=[{','.join(_runs(config))}]"]
    words += [f"baseline={config['baseline']}"] if config["baseline"] else []
    words += [f"allow=[{','.join(config['allow'])}]"] if config["allow"] else []
    words += [
        f"gate.{k}={'[' + ','.join(v) + ']' if isinstance(v, list) else v}"
        for k, v in config["gate"].items()
        if v not in (None, False)
    ]
    return shlex.join(["qtrain", "compare", *words])


def _print(comparison: Any, failed: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from qtrain.analysis.comparison_table import (
        COLUMNS,
        FEW_COLUMNS,
        headline,
        notes,
        table_rows,
        verdict_lines,
    )

    console = Console()
    rows = table_rows(comparison)
    # A table of twelve columns is read on its side where there are few arms: a column an arm
    table = Table(title=headline(comparison), title_justify="left", show_header=len(rows) > 5)
    if len(rows) > 5:
        shown = COLUMNS if console.width >= _WIDE else FEW_COLUMNS
        for column in shown:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for column, cell in zip(COLUMNS, row, strict=True) if column in shown))
    else:
        table.add_column(style="bold")
        for _ in rows:
            table.add_column(overflow="fold")
        for values in zip(COLUMNS, *rows, strict=True):
            table.add_row(*map(Text, values))
    console.print(table)
    if len(rows) > 5 and console.width < _WIDE:
        left = ", ".join(column for column in COLUMNS if column not in FEW_COLUMNS)
        console.print(Text(f"{left}: on the page, in {NUMBERS}, and in a terminal of {_WIDE} columns"))
    for label, health in verdict_lines(comparison):
        console.print(Text(f"{label}: {health.sentence}"))
    for note in notes(comparison):
        console.print(Text(f"note: {note}"))
    for failure in failed:
        console.print(Text(f"gate: {failure}"))


def _write(comparison: Any, failed: Sequence[str], config: dict[str, Any], out: Path) -> None:
    from qtrain.analysis import comparison_figures, comparison_page
    from qtrain.analysis.comparison_table import numbers

    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"command": _command(config), **numbers(comparison, failed)}, indent=1) + "\n"
    partial = out / f".{NUMBERS}.partial"
    partial.write_text(text, encoding="utf-8")
    partial.replace(out / NUMBERS)
    for picture in PICTURES:
        comparison_figures.save(comparison, out / picture)
    if config["html"]:
        png = (out / PICTURES[0]).read_bytes()
        comparison_page.save(comparison, failed, _command(config), png, out / PAGE)


def _log(comparison: Any, config: dict[str, Any], out: Path) -> list[str]:
    from qtrain.analysis import comparison_wandb
    from qtrain.training.wandb_logger import resolved_mode

    return comparison_wandb.log(
        comparison,
        _command(config),
        out / PAGE if config["html"] else None,
        mode=resolved_mode(config["wandb_mode"]),
        report=config["wandb_report"],
        project=config["wandb_project"],
        entity=config["wandb_entity"],
        dir=str(out),
    )


def run(cfg: DictConfig) -> int:
    """0; 1 where a gate does not pass; 2, and no file, where the runs cannot be compared."""
    from qtrain.analysis.arms import NotComparable
    from qtrain.analysis.comparison import compare
    from qtrain.analysis.gates import Gates, failures
    from qtrain.analysis.run_sources import places, read_all

    config = plain(cfg)
    records = read_all(places(_runs(config)))
    try:
        comparison = compare(
            records, baseline=config["baseline"], allow=config["allow"], confidence=config["confidence"]
        )
    except NotComparable as error:
        print("\n".join(f"qtrain: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    failed = failures(comparison, Gates(**config["gate"]))
    out = Path(config["out"])
    _write(comparison, failed, config, out)
    _print(comparison, failed)
    written = [NUMBERS, *PICTURES, *([PAGE] if config["html"] else [])]
    print(f"files: {', '.join(str(out / name) for name in written)}")
    if config["wandb"]:
        print(f"W&B: {', '.join(_log(comparison, config, out))}")
    return 1 if failed else 0
