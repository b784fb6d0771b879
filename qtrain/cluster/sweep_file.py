"""SWEEP/sweep.json: the arms of a sweep as it was submitted or begun, in the sweep's folder, multirun/DATE/TIME.

    {"command": "train", "submitted_at": "2026-11-26T19:02:11+00:00", "launcher": "slurm", "job": "120", "cwd": "/abs",
     "arms": [{"number": 0, "job": "120_0", "overrides": ["w=int8_row", "seed=0"], "folder": "outputs/train/RUN", "log": PATH}]}

folder, log: relative to ``cwd``, or absolute; an arm's folder appears when it starts. log: of the first of the arm's processes. A
sweep that runs in one process of this machine, arm after arm, names that ("process", "host") and no jobs; an arm whose run
is named when it starts has no folder here, and is known by its overrides.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

SWEEP = "sweep.json"


@dataclass(frozen=True)
class Arm:
    """One that was submitted."""

    number: int
    job: str
    overrides: tuple[str, ...]
    folder: str
    log: str


def take_folder(folder: Path, *, named: bool) -> Path:
    """Makes ``folder`` for one sweep: by mkdir, of which one of two that come at once gets it. named: by the user; else where it
    exists there is a number behind, ``19-02-11-2``, since sweeps of one second have one time. Raises FileExistsError for a named
    one that exists."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made, number = folder, 1
    while True:
        try:
            made.mkdir()
            return made
        except FileExistsError:
            if named:
                raise
        number += 1
        made = folder.with_name(f"{folder.name}-{number}")


def write_sweep(folder: Path, command: str, job: str, arms: Sequence[Arm], cwd: Path) -> Path:
    """Of a sweep that was submitted as ``job`` from ``cwd``. Writes the file, whole or not at all. Returns its path."""
    of_slurm = {"launcher": "slurm", "job": job, "cwd": str(cwd)}
    return _write(folder, command, of_slurm, [asdict(arm) for arm in arms])


def write_local_sweep(
    folder: Path, command: str, arms: Sequence[Sequence[str]], folders: Sequence[str | None]
) -> Path:
    """Of a sweep that this process will run. arms: the overrides of each. folders: of their runs, None where the run
    will be named when it starts. Writes as ``write_sweep`` does."""
    here = {
        "launcher": "local",
        "process": os.getpid(),
        "host": platform.node(),
        "cwd": str(Path.cwd()),
    }
    named = [
        {"number": i, "overrides": list(words), "folder": run}
        for i, (words, run) in enumerate(zip(arms, folders, strict=True))
    ]
    return _write(folder, command, here, named)


def _write(folder: Path, command: str, place: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> Path:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    content = {"command": command, "submitted_at": now, **place, "arms": list(arms)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SWEEP
    partial = path.with_name(f".{SWEEP}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path


@dataclass(frozen=True)
class ArmPlace:
    """number: within the sweep. job: its name in the batch system. folder: of its run. log: of its standard output. lives:
    of an arm without a job, whether the process that will start it lives; None where that cannot be seen. since: when it
    was submitted, ISO 8601 in UTC."""

    number: int
    overrides: tuple[str, ...]
    job: str | None
    folder: Path | None
    log: Path | None
    lives: bool | None = None
    since: str = ""


@dataclass(frozen=True)
class Sweep:
    """folder: where its sweep.json lies. launcher: of Hydra's, ``slurm``."""

    folder: Path
    command: str
    launcher: str | None
    submitted_at: str | None
    arms: tuple[ArmPlace, ...]


def read_sweep(folder: Path) -> Sweep:
    """Raises ValueError where there is no sweep.json, and where it is none."""
    path = folder / SWEEP if folder.is_dir() else folder
    if not path.is_file():
        raise ValueError(
            f"multirun={folder}: there is no {SWEEP}, which qtrain train -m leaves; of other "
            "runs give the folders, as in runs=[outputs/train]"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        cwd = Path(value.get("cwd") or ".")
        lives, since = _lives(value.get("process"), value.get("host")), str(value.get("submitted_at") or "")
        arms = tuple(replace(_arm(arm, cwd), lives=lives, since=since) for arm in value["arms"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} does not hold a sweep ({type(error).__name__}: {error})") from error
    return Sweep(
        path.parent,
        str(value.get("command") or "train"),
        value.get("launcher"),
        value.get("submitted_at"),
        arms,
    )


def _arm(arm: Mapping[str, Any], cwd: Path) -> ArmPlace:
    return ArmPlace(
        number=int(arm["number"]),
        overrides=tuple(str(word) for word in arm["overrides"]),
        job=None if arm.get("job") is None else str(arm["job"]),
        folder=_place(arm.get("folder"), cwd),
        log=_place(arm.get("log"), cwd),
    )


def _lives(process: Any, host: Any) -> bool | None:
    if not isinstance(process, int) or host != platform.node():
        return None
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _named_so(process)


def _named_so(process: int) -> bool:
    """Whether it is one of qtrain: its number may be another's by now."""
    try:
        return b"qtrain" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:  # a system without /proc
        return True


def _place(name: Any, cwd: Path) -> Path | None:
    """Absolute, unless it lies below the folder we are in: short where it can be."""
    if name is None:
        return None
    path, here = cwd / str(name), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def sweeps_below(folder: Path) -> list[Path]:
    """The folders of submitted sweeps, DATE/TIME below ``folder``, the newest last."""
    return sorted(path.parent for path in folder.glob(f"*/*/{SWEEP}"))
