"""sweep.json: the arms of a sweep as they were submitted, in the sweep's folder, multirun/DATE/TIME.

    {"command", "submitted_at", "launcher", "job", "cwd",
     "arms": [{"number", "job", "overrides", "folder", "log"}]}

``folder`` and ``log`` are relative to ``cwd``, and an arm's folder appears when it starts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SWEEP = "sweep.json"


@dataclass(frozen=True)
class ArmPlace:
    """number: within the sweep. job: its name in the batch system. folder: of its run. log: of its standard output."""

    number: int
    overrides: tuple[str, ...]
    job: str | None
    folder: Path | None
    log: Path | None


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
            f"multirun={folder}: there is no {SWEEP}, which sweeps have that were submitted (hydra/launcher=slurm); of others "
            "give the runs, as in runs=[outputs/train]"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        cwd = Path(value.get("cwd") or ".")
        arms = tuple(_arm(arm, cwd) for arm in value["arms"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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


def _place(name: Any, cwd: Path) -> Path | None:
    """Absolute, unless it lies below the folder we are in: short where it can be."""
    if name is None:
        return None
    path, here = cwd / str(name), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def sweeps_below(folder: Path) -> list[Path]:
    """The folders of submitted sweeps, DATE/TIME below ``folder``, the newest last."""
    return sorted(path.parent for path in folder.glob(f"*/*/{SWEEP}"))
