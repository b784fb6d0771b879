"""What pages of studies share: results between two markers, and what was run to get them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from study_runs import Run

from qtrain.training.run_folder import SUMMARY, write_text

END = "<!-- end of the results -->"


def begin(script: str) -> str:
    """The marker before the results that scripts/``script`` writes."""
    return f"<!-- results: written by scripts/{script} -->"


def check_alike(runs: Sequence[Run]) -> None:
    """Raises ValueError unless all runs were validated on the same tokens."""
    found = {}
    for run in runs:
        if run.outcome == "completed":
            data = json.loads((run.folder / SUMMARY).read_text(encoding="utf-8"))["data"]
            found.setdefault(json.dumps(data, sort_keys=True), run.name)
    if len(found) > 1:
        raise ValueError(
            f"{' and '.join(found.values())} were validated on other data; run them anew with the same"
        )


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def provenance(script: str, runs: Sequence[Run], settings: Sequence[str]) -> list[str]:
    """What was run, with which code, when, and what it cost."""
    versions = [json.loads((run.folder / "versions.json").read_text(encoding="utf-8")) for run in runs]
    commits = sorted({f"{v['git_commit']}{' (modified)' if v['git_modified'] else ''}" for v in versions})
    one = versions[0]
    packages = ", ".join(f"{name} {one[name]}" for name in ("python", "torch", "lightning", "numpy"))
    attempts = [
        json.loads(line) for run in runs for line in (run.folder / "attempts.jsonl").read_text().splitlines()
    ]
    minutes = sum(run.cpu_seconds for run in runs) / 60
    days = sorted(
        {time.strftime("%Y-%m-%d", time.gmtime((r.folder / "verdict.json").stat().st_mtime)) for r in runs}
    )
    seeds = sorted({run.seed for run in runs})
    return [
        f"Command: `bash scripts/{script}{''.join(f' {s}' for s in settings)}`, commit {', '.join(commits)}.",
        f"{packages}; {one['platform']}. {', '.join(days)}.",
        f"{len(runs)} runs ({len(seeds)} seeds) in {len(attempts)} attempts, {minutes:.0f} minutes of processor time on "
        f"one core each.",
    ]


def write_page(page: Path, script: str, text: str) -> None:
    """Puts ``text`` between the markers of ``script`` in ``page``. Raises ValueError where it has none."""
    old = page.read_text(encoding="utf-8")
    first = begin(script)
    if old.count(first) != 1 or old.count(END) != 1 or old.index(first) > old.index(END):
        raise ValueError(
            f"{page}: the results go between a line {first!r} and a later one {END!r}; put them there"
        )
    before, after = old[: old.index(first)], old[old.index(END) :]
    write_text(page, f"{before}{first}\n\n{text}\n\n{after}")
