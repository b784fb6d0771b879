"""Where a run starts: anew, where it was left, or from another run's checkpoint.

    resume=null                 a new folder, step 0
    resume=auto run=NAME        the run's own folder: its newest checkpoint that is whole, or step 0 where it never saved
    resume=CHECKPOINT or RUN    a new folder, from that checkpoint

In the run's own folder nothing is kept twice: rows of the metrics after the checkpoint are dropped, since the same
steps give the same rows again. Checkpoints that are cut or altered are set aside under ``refused-``, and named.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from qtrain.analysis.instrument_records import INSTRUMENTS, rewound_instruments
from qtrain.cluster.slurm_job import SlurmJob

from .assembly import Assembly
from .callbacks.metrics_jsonl import METRICS, rewound_metrics
from .checkpoints import CheckpointError, load_checkpoint, remove_leftovers, verified
from .identity import differences
from .run_folder import (
    ATTEMPTS,
    CHECKPOINTS,
    STARTED_WITH,
    VERDICT,
    append_line,
    create_run_folder,
    lock_run,
    read_lines,
    versions,
    write_json,
    write_text,
)
from .saved import checkpoint_of


class StartRefused(ValueError):
    """The run cannot start as it was asked to; nothing was changed."""


@contextmanager
def refusing() -> Iterator[None]:
    """Around what is put together and opened before a run has a folder: what refuses it (ValueError) refuses the start."""
    try:
        yield
    except ValueError as error:
        raise StartRefused(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class Start:
    """folder: of the run. checkpoint: what it goes on from, at ``step``; None and 0 for a new run. finished: it was
    completed before, and nothing is left to do. refused: what newer checkpoints were not taken, and why. run_id: the same
    for all attempts of a run; its name for W&B, where they are one curve."""

    folder: Path
    checkpoint: Path | None = None
    step: int = 0
    finished: bool = False
    refused: tuple[str, ...] = ()
    run_id: str = ""


def own_folder(parts: Assembly) -> Path | None:
    """The folder that ``resume=auto`` goes on in; None where the run is new."""
    settings = parts.settings
    if settings.resume != "auto":
        return None
    assert settings.run is not None
    folder = Path(settings.out) / settings.name / settings.run
    return folder if folder.is_dir() else None


def start_run(parts: Assembly, data: Mapping[str, Any], held: ExitStack) -> Start:
    """Makes or takes the run's folder, for one process. data: the identity of the data that the run will read. held:
    receives the run's lock, which must be held until it ends.

    Raises StartRefused where there is nothing whole to go on from, where the checkpoint is of another run, where
    another process trains it, and where nothing can be written.
    """
    own = own_folder(parts)
    try:
        start = _new(parts, data, held) if own is None else _in_place(parts, own, data, held)
        if not start.finished:
            write_text(start.folder / "config.yaml", yaml.safe_dump(dict(parts.config), sort_keys=False))
            write_json(start.folder / "versions.json", versions())
    except (ValueError, FileExistsError) as error:
        held.close()
        raise StartRefused(str(error)) from error
    except OSError as error:
        held.close()
        raise StartRefused(
            f"the run's folder cannot be written: {error}; make room and start it again, or choose another out="
        ) from error
    for sentence in start.refused:
        print(f"refused: {sentence}", file=sys.stderr)
    if start.step and not start.finished:
        print(f"{start.folder} goes on after step {start.step}", file=sys.stderr)
    return start


def _new(parts: Assembly, data: Mapping[str, Any], held: ExitStack) -> Start:
    settings, checkpoint, step = parts.settings, None, 0
    if settings.resume is not None and settings.resume != "auto":
        checkpoint = checkpoint_of(settings.resume)
        step = _step_of_same_run(checkpoint, parts, data)
        if step >= settings.steps:
            raise ValueError(
                f"resume={settings.resume} stands at step {step} of steps={settings.steps}: nothing is left to do; raise "
                "steps"
            )
    folder = create_run_folder(settings.out, settings.name, settings.run)
    held.enter_context(lock_run(folder))
    return _recorded(Start(folder=folder, checkpoint=checkpoint, step=step), None, [])


def _other_run(
    saved: Mapping[str, Any], checkpoint: Path, parts: Assembly, data: Mapping[str, Any]
) -> str | None:
    """A sentence where the checkpoint is of another run."""
    different = differences(saved, parts.config, parts.model_config, parts.recipe, data)
    return f"the checkpoint {checkpoint} is of another run ({'; '.join(different)})" if different else None


def _step_of_same_run(checkpoint: Path, parts: Assembly, data: Mapping[str, Any]) -> int:
    saved = load_checkpoint(checkpoint)
    other = _other_run(saved, checkpoint, parts, data)
    if other is not None:
        raise ValueError(f"{other}; give the same settings, or start anew without resume=")
    return int(saved["qtrain"]["step"])


def _newest(
    place: Path, parts: Assembly, data: Mapping[str, Any]
) -> tuple[Path | None, int, list[tuple[Path, str]]]:
    """The latest checkpoint that is whole and of this run, its step, and the later ones with what is wrong with each.

    Raises ValueError where there are checkpoints and none will do.
    """
    refused: list[tuple[Path, str]] = []
    for path, problem in verified(place):
        if problem is None:
            saved = load_checkpoint(path, checked=True)
            problem = _other_run(saved, path, parts, data)
            if problem is None:
                return path, int(saved["qtrain"]["step"]), refused
        refused.append((path, problem))
    if refused:
        sentences = "; ".join(sentence for _, sentence in refused)
        raise CheckpointError(
            f"the run {place.parent} has no checkpoint to go on from: {sentences}. Give the run's own settings, bring a "
            "whole checkpoint back, or start anew under another run="
        )
    return None, 0, []


def _in_place(parts: Assembly, folder: Path, data: Mapping[str, Any], held: ExitStack) -> Start:
    held.enter_context(lock_run(folder))
    place, steps = folder / CHECKPOINTS, parts.settings.steps
    if place.is_dir():
        remove_leftovers(place)
    elif place.exists():
        raise ValueError(
            f"{place} is a file, where the folder of checkpoints belongs; remove it, or bring that back"
        )
    checkpoint, step, refused = _newest(place, parts, data)
    if step > steps:
        raise ValueError(
            f"the run {folder} stands at step {step}, beyond steps={steps}; raise steps, or start anew under another run="
        )
    previous = _verdict(folder)
    finished = previous is not None and previous.get("outcome") == "completed" and step == steps
    # Whatever may be refused is read before anything is changed
    attempts = [] if finished else _attempts(folder)
    metrics = None if finished else _metrics(folder / METRICS, step, steps, attempts)
    instruments = None if finished else rewound_instruments(folder / INSTRUMENTS, step)
    for path, _ in refused:
        _set_aside(path)
    sentences = tuple(sentence for _, sentence in refused)
    start = Start(folder=folder, checkpoint=checkpoint, step=step, finished=finished, refused=sentences)
    if finished:
        return start
    start = _recorded(start, previous, attempts)
    (folder / VERDICT).unlink(missing_ok=True)
    if metrics is not None:
        write_text(folder / METRICS, metrics)
    if instruments is not None:
        write_text(folder / INSTRUMENTS, instruments)
    return start


def _attempts(folder: Path) -> list[dict[str, Any]]:
    path = folder / ATTEMPTS
    return read_lines(path) if path.is_file() else []


def _metrics(path: Path, step: int, steps: int, attempts: Sequence[Mapping[str, Any]]) -> str | None:
    """What the metrics file will be; None where nothing is written yet. Raises ValueError."""
    begun = min((row["step"] for row in attempts), default=0)
    if begun < step and not path.is_file():
        raise ValueError(
            f"{path}, the curve of the steps until {step}, is missing: bring it back, or go on in another folder with "
            "resume=CHECKPOINT run=ANOTHER"
        )
    return rewound_metrics(path, step, begun=begun, last=step == steps)


def _set_aside(path: Path) -> None:
    """Under a name that is no checkpoint's, with a number where one of the same step was refused before."""
    number, target = 1, path.with_name(f"refused-{path.name}")
    while target.exists():
        number += 1
        target = path.with_name(f"refused-{path.name}-{number}")
    path.rename(target)


def _verdict(folder: Path) -> dict[str, Any] | None:
    """How the last attempt ended; None where it left no word."""
    path = folder / VERDICT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _recorded(start: Start, previous: Mapping[str, Any] | None, attempts: list[dict[str, Any]]) -> Start:
    """``start`` with its run's id, written down as one more attempt after ``attempts``. previous: the verdict of the
    one before."""
    run_id = attempts[0]["run_id"] if attempts else secrets.token_hex(4)
    job = SlurmJob.here()
    row = {
        "attempt": len(attempts) + 1,
        "run_id": run_id,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "pid": os.getpid(),
        "overrides": json.loads(os.environ.get(STARTED_WITH, "null")),
        "step": start.step,
        "checkpoint": None if start.checkpoint is None else str(start.checkpoint),
        "refused": list(start.refused),
        "previous": None if previous is None else previous.get("message"),
        "git_commit": versions()["git_commit"],
        "slurm": None if job is None else asdict(job),
    }
    append_line(start.folder / ATTEMPTS, row)
    return replace(start, run_id=run_id)
