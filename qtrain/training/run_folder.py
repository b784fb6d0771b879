"""The folder of a run, and how files get into it: whole or not at all.

config.yaml versions.json attempts.jsonl surgery.txt plan.json census.json metrics.jsonl instruments.jsonl checkpoints/ wandb/
window_losses.npy loss.png sample.txt summary.json verdict.json

attempts.jsonl has a line for each time that the run was started: when, where, in which job of SLURM, from which checkpoint,
how the attempt before it ended, and what was refused on the way.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import io
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

PACKAGES = ("qtrain", "torch", "lightning", "numpy", "hydra-core", "triton", "wandb")
SUMMARY, VERDICT, CENSUS, ATTEMPTS = "summary.json", "verdict.json", "census.json", "attempts.jsonl"
PLAN = "plan.json"  # of compute=auto: what was measured
WINDOW_LOSSES = "window_losses.npy"  # [n] float32, nats per token of every validation window, in their order
CHECKPOINTS, LOCK = "checkpoints", ".lock"


def create_run_folder(out: str | Path, name: str, run: str | None) -> Path:
    """``out/name/run``, newly made. run None: the time, with a number behind where that exists already.

    Raises FileExistsError where a named run exists: two runs must not mix their files; ValueError where nothing can
    be written.
    """
    parent = Path(out) / name
    try:
        return _create(parent, run)
    except FileExistsError:
        raise
    except OSError as error:
        raise ValueError(f"out={out} cannot be written: {error.strerror}; choose another out=") from error


def _create(parent: Path, run: str | None) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    if run is not None:
        try:
            (parent / run).mkdir()
        except FileExistsError:
            raise FileExistsError(
                f"the run {parent / run} exists; choose another run=, go on with it (resume=auto), or remove that folder"
            ) from None
        return parent / run
    stamp, number = time.strftime("%Y%m%d-%H%M%S"), 1
    while True:
        folder = parent / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


def lock_run(folder: Path) -> IO[str]:
    """Takes the run for this process: hold the file that is returned until the run ends; a dead process holds none.

    Raises ValueError, naming the holder, where another process writes in the folder.
    """
    file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ValueError(
            f"the run {folder} is being trained by {holder}; wait for it, or choose another run="
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """One more line of JSON, on disk when this returns; in the place of one that a killed process left half-written."""
    with path.open("ab+") as file:
        file.seek(0)
        held = file.read()
        file.truncate(held.rfind(b"\n") + 1)
        file.write((json.dumps(jsonable(value)) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file, but for a last one that a killed process left half-written. Raises ValueError
    for any other that is no JSON."""
    rows = []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:  # UnicodeDecodeError is one too
            raise ValueError(f"{path}, line {number}: no JSON ({error}); the file was altered") from error
    return rows


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Replaces ``path`` at once: a reader, or a kill, meets the old file or the new one."""
    _write(path, text.encode())


def write_array(path: Path, array: NDArray[Any]) -> None:
    """As ``write_text``, in numpy's format."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    _write(path, buffer.getvalue())


def write_json(path: Path, value: Any) -> None:
    """Numbers that JSON lacks (nan, inf) become strings."""
    write_text(path, json.dumps(jsonable(value), indent=1) + "\n")


def jsonable(value: Any) -> Any:
    """``value`` with ``"nan"``, ``"inf"`` and ``"-inf"`` for the numbers that JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    return value


@cache
def versions() -> dict[str, Any]:
    """Versions of Python and of the packages a run depends on, and the code's git commit where it has one."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {**found, **_git()}


def _git() -> dict[str, Any]:
    """The commit of the checkout that this file lies in, and whether tracked files differ from it; None outside
    one (an installed wheel)."""

    def ask(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    # A wheel installed below some other project's checkout is not that project's code
    if commit is None or not ask("ls-files", Path(__file__).name):
        return {"git_commit": None, "git_modified": None}
    return {"git_commit": commit, "git_modified": bool(ask("status", "--porcelain", "--untracked-files=no"))}
