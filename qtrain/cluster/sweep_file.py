"""SWEEP/sweep.json: which jobs a submission made, and where the run of each lies.

    {"command": "train", "submitted_at": "2026-11-26T19:02:11+00:00", "launcher": "slurm", "job": "120", "cwd": "/abs",
     "arms": [{"number": 0, "job": "120_0", "overrides": ["w=int8_row", "seed=0"], "folder": "outputs/train/RUN", "log": PATH}]}

folder: relative to ``cwd``, or absolute where ``out`` is. log: of the first of the arm's processes, absolute.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

SWEEP = "sweep.json"


@dataclass(frozen=True)
class Arm:
    number: int
    job: str
    overrides: tuple[str, ...]
    folder: str
    log: str


def write_sweep(folder: Path, command: str, job: str, arms: Sequence[Arm], cwd: Path) -> Path:
    """Writes the file, whole or not at all. Returns its path."""
    content = {
        "command": command,
        "submitted_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "launcher": "slurm",
        "job": job,
        "arms": [asdict(arm) for arm in arms],
        "cwd": str(cwd),
    }
    path = folder / SWEEP
    partial = path.with_name(f".{SWEEP}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path
