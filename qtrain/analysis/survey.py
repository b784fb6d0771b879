"""Many runs at a glance: where each stands, how far it is, what its curve says, what failed and why, and when all are done.

Rows come from run folders, and from the arms of a submitted sweep, which have no folder until they start. Liveness and the
batch system's answers are handed in.
"""

from __future__ import annotations

import math
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qtrain.cluster.queue import JobState, Queue
from qtrain.cluster.sweep_file import ArmPlace

from .health import Health
from .instrument_records import Alert
from .log_causes import Cause, cause_in, logs_beside
from .run_labels import short_labels
from .run_states import (
    CANCELLED,
    COMPLETED,
    DIVERGED,
    FAILED,
    INTERRUPTED,
    LOST,
    QUEUED,
    RUNNING,
    SILENT,
    TROUBLE,
    UNDER_WAY,
    UNREADABLE,
    Standing,
    host,
    job_of,
    of_job,
    of_run,
    seconds_left,
    work_left,
)
from .run_tail import RunTail, read_tail


@dataclass(frozen=True, eq=False)
class Row:
    """A run or an arm. label: what tells it apart. tail, health: None before it has a folder. left: seconds to its last
    step. node: where it trains, or did. cause: of a failure, as its log has it. command: what to do next; None where nothing
    is to be done."""

    label: str
    standing: Standing
    folder: Path | None = None
    tail: RunTail | None = field(default=None, repr=False)
    health: Health | None = field(default=None, repr=False)
    job: str | None = None
    node: str | None = None
    left: float | None = None
    log: Path | None = None
    cause: Cause | None = None
    command: str | None = None

    @property
    def state(self) -> str:
        return self.standing.state

    @property
    def trouble(self) -> bool:
        """Whether somebody should look at it: also at a run that trains on though its loss has left it."""
        return self.state in TROUBLE or self.verdict in (DIVERGED, FAILED)

    @property
    def attempts(self) -> int:
        return len(self.tail.attempts) if self.tail is not None else 0

    @property
    def alerts(self) -> tuple[Alert, ...]:
        return self.tail.record.alerts if self.tail is not None else ()

    @property
    def verdict(self) -> str | None:
        """Of what it computed until now; None where there is nothing to judge."""
        if self.tail is None or self.health is None or not self.tail.step or self.state == UNREADABLE:
            return None
        return self.health.verdict


@dataclass(frozen=True)
class Survey:
    """rows: the arms, and then other folders, in their orders. notes: what could not be asked. arms: how many are arms."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    arms: int = 0

    def of_arms(self) -> Survey:
        """Without other folders."""
        return replace(self, rows=self.rows[: self.arms])

    @property
    def left(self) -> float | None:
        """Seconds until all are done; None where it cannot be told."""
        under_way = [row for row in self.rows if row.state in UNDER_WAY]
        running = [row.left for row in under_way if row.state == RUNNING and row.left is not None]
        return work_left([row.left for row in under_way], running)

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(row.state for row in self.rows))

    @property
    def under_way(self) -> bool:
        return any(row.state in UNDER_WAY for row in self.rows)

    @property
    def troubled(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.trouble)


def survey(
    folders: Iterable[Path],
    arms: Sequence[ArmPlace],
    *,
    alive: Callable[[Path], bool | None],
    ask: Callable[[Iterable[str]], Queue],
    now: float,
    read: Callable[[Path], RunTail | None] = read_tail,
) -> Survey:
    """folders: of runs. arms: of submitted sweeps; those with a folder are the same rows as it. alive: whether the process
    of a run's folder lives, None where that cannot be seen. ask: the batch system (``ask_slurm``). now: seconds since the
    epoch. read: of a folder what it says (a ``TailReader``, where this is called again and again)."""
    read_first = {_key(folder): tail for folder in folders if (tail := read(folder)) is not None}
    arms = [
        replace(arm, folder=_started_as(arm, read_first.values())) if arm.folder is None else arm
        for arm in arms
    ]
    # An arm that was submitted again has the folder of the first time: the later submission counts
    arms = list({_key(arm.folder) if arm.folder else str(arm): arm for arm in arms}.values())
    of_arm = {_key(arm.folder): arm for arm in arms if arm.folder is not None}
    further = {
        key: arm.folder for key, arm in of_arm.items() if key not in read_first and arm.folder is not None
    }
    tails = {
        **read_first,
        **{key: tail for key, place in further.items() if (tail := read(place)) is not None},
    }
    waiting = [arm for arm in arms if arm.folder is None or _key(arm.folder) not in tails]
    jobs = [name for key, tail in tails.items() for name in _job_names(tail, of_arm.get(key))]
    queue = ask([*jobs, *(arm.job for arm in waiting if arm.job is not None)])
    names = _labels(tails, of_arm, arms)
    rows = {
        key: _row_of_run(names[key], tail, of_arm.get(key), alive(tail.folder), queue, now)
        for key, tail in tails.items()
    }
    of_arms = [
        _row_of_arm(_arm_label(arm, arms), arm, queue) if arm in waiting else rows.pop(_key(arm.folder))
        for arm in arms
    ]
    return Survey((*of_arms, *rows.values()), queue.notes, len(of_arms))


def _started_as(arm: ArmPlace, tails: Iterable[RunTail]) -> Path | None:
    """The folder of an arm that none was fixed for: of the run that these words started since."""
    for tail in tails:
        first = tail.attempts[0] if tail.attempts else {}
        if first.get("overrides") == list(arm.overrides) and str(first.get("time", "")) >= arm.since:
            return tail.folder
    return None


def _key(folder: Path | None) -> str:
    """The same for all names of a folder."""
    return "" if folder is None else os.path.realpath(folder)


def _labels(
    tails: Mapping[str, RunTail], of_arm: Mapping[str, ArmPlace], arms: Sequence[ArmPlace]
) -> dict[str, str]:
    """Of a sweep's arms the words that tell them apart, of others what ``short_labels`` finds in their configs."""
    others = {key: tail for key, tail in tails.items() if key not in of_arm}
    found = short_labels(
        [tail.record.name for tail in others.values()],
        [tail.config for tail in others.values()],
        [tail.folder.name for tail in others.values()],
    )
    return {**dict(zip(others, found, strict=True)), **{k: _arm_label(a, arms) for k, a in of_arm.items()}}


def _arm_label(arm: ArmPlace, arms: Sequence[ArmPlace]) -> str:
    common = set.intersection(*(set(other.overrides) for other in arms)) if len(arms) > 1 else set()
    fixed = ("run=", "resume=", "name=")
    words = [word for word in arm.overrides if word not in common and not word.startswith(fixed)]
    return " ".join(words) or (arm.folder.name if arm.folder is not None else f"arm {arm.number}")


def _job_names(tail: RunTail, arm: ArmPlace | None) -> list[str]:
    """Those that may train it: the one it was submitted as, and that of its last attempt."""
    if tail.verdict.get("outcome") == "completed":
        return []
    return [name for name in (arm.job if arm is not None else None, job_of(tail)) if name is not None]


def _job(tail: RunTail, arm: ArmPlace | None, queue: Queue) -> tuple[str | None, JobState | None]:
    """The job that trains it or will; else that of its last attempt, which is none where that was started by hand."""
    for name in _job_names(tail, arm):
        job = queue.jobs.get(name)
        if job is not None and not job.ended:
            return name, job
    last = job_of(tail) if tail.attempts or arm is None else arm.job
    return last, queue.jobs.get(last) if last is not None else None


def _row_of_run(
    label: str,
    tail: RunTail,
    arm: ArmPlace | None,
    alive: bool | None,
    queue: Queue,
    now: float,
) -> Row:
    job_name, job = _job(tail, arm, queue)
    standing = of_run(tail, alive, job, now)
    if standing.state == COMPLETED and tail.health.verdict == DIVERGED:
        standing = Standing(DIVERGED, tail.health.sentence.removeprefix("diverged: "))
    log = arm.log if arm is not None else None
    nodes = (tail.attempts[-1].get("slurm") or {}).get("nodes") if tail.attempts else None
    cause = None
    if standing.state in TROUBLE and not tail.verdict and log is not None:
        cause = cause_in(logs_beside(log))
    return Row(
        label=label,
        standing=standing,
        folder=tail.folder,
        tail=tail,
        health=tail.health,
        job=job_name,
        node=(job.nodes if job is not None and job.active else None)
        or nodes
        or (host(tail) if tail.attempts else None),
        left=seconds_left(tail, standing, now) if standing.state in UNDER_WAY else None,
        log=log,
        cause=cause,
        command=_next(standing.state, tail.folder, arm, tail),
    )


def _row_of_arm(label: str, arm: ArmPlace, queue: Queue) -> Row:
    """Of an arm that has left no folder."""
    job = queue.jobs.get(arm.job) if arm.job is not None else None
    if job is not None:
        standing = of_job(job)
    elif arm.job is None and arm.lives:
        standing = Standing(QUEUED, "after others")
    elif arm.job is None:
        standing = Standing(LOST, "it never began, and the process of its sweep is gone")
    elif queue.asked:
        standing = Standing(LOST, "it left no folder, and SLURM no longer knows its job")
    else:
        standing = Standing(SILENT, "it has no folder yet, and SLURM could not be asked for its job")
    trouble = standing.state in TROUBLE
    return Row(
        label=label,
        standing=standing,
        folder=arm.folder,
        job=arm.job,
        node=job.nodes if job is not None else None,
        log=arm.log,
        cause=cause_in(logs_beside(arm.log)) if trouble and arm.log is not None else None,
        command=_next(standing.state, arm.folder, arm, None),
    )


def _next(state: str, folder: Path | None, arm: ArmPlace | None, tail: RunTail | None) -> str | None:
    """The command that goes on with a run, or starts an arm again."""
    if state == SILENT and folder is not None:
        return f"tail -n 3 {shlex.quote(str(folder / 'metrics.jsonl'))}"
    if state not in (INTERRUPTED, LOST, FAILED, CANCELLED):
        return None
    words = arm.overrides if arm is not None else _words_of(tail)
    if folder is None:
        return shlex.join(["qtrain", "train", *words])
    fixed = {"name": folder.parent.name, "run": folder.name, "resume": "auto"}
    kept = [w for w in words if w.split("=", 1)[0] not in fixed]
    start = [
        "qtrain",
        "train",
        *(["-m", "hydra/launcher=slurm"] if arm is not None and arm.job is not None else []),
    ]
    return shlex.join([*start, *kept, *(f"{key}={value}" for key, value in fixed.items())])


def _words_of(tail: RunTail | None) -> Sequence[str]:
    """The words of the command line that started the run, as its attempts have them."""
    words: Any = tail.attempts[-1].get("overrides") if tail is not None and tail.attempts else None
    return [str(word) for word in words] if isinstance(words, list) else []


def as_json(found: Survey) -> dict[str, Any]:
    """For programs. Times in seconds, losses in nats a token; null for what is not known."""
    return {
        "counts": found.counts,
        "seconds_left": _finite(found.left),
        "notes": list(found.notes),
        "runs": [_row_json(row) for row in found.rows],
    }


def _row_json(row: Row) -> dict[str, Any]:
    tail, health = row.tail, row.health
    return {
        "label": row.label,
        "state": row.state,
        "why": row.standing.why,
        "folder": None if row.folder is None else str(row.folder),
        "step": tail.step if tail else 0,
        "steps": tail.steps if tail else None,
        "loss": _finite(tail.loss) if tail else None,
        "val_loss": _finite(tail.val_loss) if tail else None,
        "verdict": row.verdict,
        "sentence": health.sentence if health else None,
        "judged_whole": tail.whole if tail else None,
        "alarms": dict(Counter(alert.name for alert in row.alerts)),
        "tokens_per_s": _finite(tail.tokens_per_s) if tail else None,
        "seconds_a_step": tail.pace if tail else None,
        "seconds_left": _finite(row.left),
        "attempts": row.attempts,
        "job": row.job,
        "node": row.node,
        "log": None if row.log is None else str(row.log),
        "cause": None if row.cause is None else {"kind": row.cause.kind, "line": row.cause.line},
        "next": row.command,
    }


def _finite(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
