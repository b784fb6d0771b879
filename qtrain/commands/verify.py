"""qtrain verify: measure what is claimed of low-precision training, here and now.

    qtrain verify                                    all claims
    qtrain verify only=[m2_int8_zero_bin,QuEST]      some, by name or by theme
    qtrain verify out=FOLDER budget_minutes=10       stops in time; the same command goes on where it was

A claim is a number and the range that a paper, or a measurement, says it lies in (qtrain/analysis/claims). It holds where the whole
interval of the measurement lies in the range, does not hold where none of it does; else this scale cannot tell. Exit codes: 0 where
everything chosen was measured, whatever came of it (with strict=true 1 where something does not hold or raised), 75 where time
ran out.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from .train import plain

CONFIG = "verify"
UNFINISHED = 75  # EX_TEMPFAIL of sysexits.h: try again


def check(cfg: DictConfig) -> None:
    """Raises ValueError for unknown claims, a budget that is not positive and a page without markers."""
    from qtrain.analysis.verification import between_markers, chosen

    config = plain(cfg)
    chosen(config["only"])
    budget = config["budget_minutes"]
    if budget is not None and not (isinstance(budget, int | float) and budget > 0):
        raise ValueError(f"budget_minutes={budget!r}: must be positive, or null for as long as it takes")
    if config["page"] is not None:
        if not Path(config["page"]).is_file():
            raise ValueError(
                f"page={config['page']}: no such file; it needs the markers that docs/verification.md has"
            )
        between_markers(Path(config["page"]).read_text(encoding="utf-8"), "")


def run(cfg: DictConfig) -> int:
    """Measure, print, keep."""
    from rich.console import Console
    from rich.table import Table

    from qtrain.analysis import verification
    from qtrain.analysis.claims import FAILS, Bench
    from qtrain.training.run_folder import versions, write_json, write_text

    config = plain(cfg)
    budget = config["budget_minutes"]
    deadline = None if budget is None else time.monotonic() + 60 * budget
    bench = Bench(Path(config["out"]), deadline)
    found = verification.verify(verification.chosen(config["only"]), bench, print)
    table = Table(title=verification.counted(found), show_lines=False)
    for column in verification.HEADER:
        table.add_column(column, overflow="fold")
    for theme, findings in verification.themed(found).items():
        table.add_section()
        table.add_row(f"[bold]{theme}[/bold]")
        for finding in findings:
            table.add_row(*verification.cells(finding))
    Console(width=None if Console().is_terminal else 180, markup=True).print(table)
    for finding in found:
        if finding.problem:
            print(f"{finding.claim.name}: {finding.problem}")
    write_json(bench.folder / "verification.json", _numbers(found, versions(), bench.size.key))
    text = verification.page(found, _command(config), versions(), bench.size.key)
    write_text(bench.folder / "verification.md", text)
    if config["page"] is not None:
        page = Path(config["page"])
        write_text(page, verification.between_markers(page.read_text(encoding="utf-8"), text))
    print(f"files: {bench.folder / 'verification.md'}, {bench.folder / 'verification.json'}")
    outcomes = {finding.outcome for finding in found}
    if verification.OPEN in outcomes:
        print("time ran out: the same command goes on where it was")
        return UNFINISHED
    return 1 if config["strict"] and outcomes & {FAILS, verification.ERROR} else 0


def _command(config: dict[str, Any]) -> str:
    only = "" if config["only"] is None else f" only=[{','.join(config['only'])}]"
    return f"qtrain verify{only}"


def _numbers(found: Any, versions: dict[str, Any], size: str) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "versions": versions,
        "size": size,
        "claims": {
            f.claim.name: {
                "says": f.claim.says,
                "source": f.claim.source,
                "quantity": f.claim.quantity,
                "expected": f.claim.expected,
                "measured": None if f.measured is None else asdict(f.measured),
                "outcome": f.outcome,
                "problem": f.problem,
                "seconds": f.seconds,
            }
            for f in found
        },
    }
