"""Where runs are: folders, folders of folders, globs, W&B's offline folders, a W&B project or group."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from .run_records import RunRecord, read_run
from .wandb_runs import ONLINE, read_offline, read_online

# Any of these makes a folder that of a run, whatever it lost
_MARKS = ("config.yaml", "metrics.jsonl", "verdict.json", "attempts.jsonl", "summary.json")
# outputs/EXPERIMENT/RUN: how far below a folder that is named runs are looked for
_DEPTH = 2


def _is_run(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in _MARKS)


def _is_offline(path: Path) -> bool:
    return path.suffix == ".wandb" if path.is_file() else any(path.glob("*.wandb"))


def _within(folder: Path, depth: int) -> list[Path]:
    """The runs in a folder; those of W&B inside of a run of ours are its own."""
    if _is_run(folder) or _is_offline(folder):
        return [folder]
    if depth == 0:
        return []
    # latest-run is W&B's link to a folder beside it
    inner = sorted(
        f for f in folder.iterdir() if f.is_dir() and not f.is_symlink() and not f.name.startswith(".")
    )
    return [run for f in inner for run in _within(f, depth - 1)]


def places(runs: Sequence[str]) -> list[Path | str]:
    """What ``runs`` names: folders of runs, W&B's offline folders or files, and addresses of projects online, each once.

    Raises ValueError for a name with nothing behind it."""
    found: dict[Path | str, None] = {}
    for name in runs:
        if name.startswith(ONLINE):
            found[name] = None
            continue
        path = Path(name)
        paths = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(name))]
        if not paths:
            raise ValueError(
                f"runs: there is no {name}; give folders of runs, globs, or wandb:ENTITY/PROJECT[/GROUP]"
            )
        inside = [p for given in paths for p in ([given] if given.is_file() else _within(given, _DEPTH))]
        if not inside and any(any(p.iterdir()) for p in paths if p.is_dir()):
            raise ValueError(
                f"runs: {name} holds no run (a folder with {', '.join(_MARKS[:3])}, or a .wandb file)"
            )
        # A folder that is named and empty is a run that lost all
        for run in inside or paths:
            found[run] = None
    if not found:
        raise ValueError("runs=[]: name at least one folder, glob or wandb:ENTITY/PROJECT[/GROUP]")
    return list(found)


def run_folders(runs: Sequence[str]) -> list[Path]:
    """Those of ``places`` that are folders of runs of ours. Raises ValueError as ``places`` does."""
    return [
        p
        for p in places(runs)
        if isinstance(p, Path) and p.is_dir() and not (_is_offline(p) and not _is_run(p))
    ]


def read_all(found: Sequence[Path | str]) -> list[RunRecord]:
    """The records of what ``places`` found, W&B's after the folders'. Raises ValueError as ``read_online``."""
    online = [p for p in found if isinstance(p, str)]
    offline = [p for p in found if isinstance(p, Path) and _is_offline(p) and not _is_run(p)]
    folders = [p for p in found if isinstance(p, Path) and p not in set(offline)]
    records = [read_run(folder) for folder in folders]
    if offline:
        records += read_offline(offline)
    return [*records, *(run for address in online for run in read_online(address))]
