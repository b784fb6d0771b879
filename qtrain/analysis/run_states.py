"""Where a run stands: what its files say, whether its process lives, and what the batch system says of its job.

queued       submitted; its job waits
starting     its process or job runs, and no step is done yet
running      it trains
requeued     interrupted, with a checkpoint; its job waits to go on
completed    it ran to its last step
diverged     a loss or gradient was not finite, or it ended far above its best validation
stopped      it ended with another verdict: census_failed, storage_failed, ...
interrupted  it saved and stopped after a signal, and nothing will go on with it by itself
cancelled    its job was cancelled
failed       its job ended badly: a time limit, memory, a node, an exit code
lost         it started, did not end, and nobody trains it
silent       another machine trained it, and it has not written for long: alive or lost
unreadable   its files are not those of a run
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtrain.cluster.queue import JobState

from .run_tail import RunTail

QUEUED, STARTING, RUNNING, REQUEUED, COMPLETED = "queued", "starting", "running", "requeued", "completed"
DIVERGED, STOPPED, INTERRUPTED, CANCELLED = "diverged", "stopped", "interrupted", "cancelled"
FAILED, LOST, SILENT, UNREADABLE = "failed", "lost", "silent", "unreadable"
UNDER_WAY = (QUEUED, STARTING, RUNNING, REQUEUED)
TROUBLE = (DIVERGED, STOPPED, INTERRUPTED, CANCELLED, FAILED, LOST, SILENT, UNREADABLE)
STATES = (*UNDER_WAY, COMPLETED, *TROUBLE)

# A run that writes nothing for longer is called silent: validations, checkpoints and compilation take minutes; of slow
# steps that many
SILENT_SECONDS, SILENT_STEPS = 600.0, 20


@dataclass(frozen=True)
class Standing:
    """state: see above. why: a phrase behind it, SLURM's or the verdict's; None where there is nothing to say."""

    state: str
    why: str | None = None


def of_job(job: JobState) -> Standing:
    """Of a job alone: of an arm that has left no folder, or a run without a verdict."""
    if job.waiting:
        return Standing(QUEUED, job.reason)
    if job.active:
        return Standing(STARTING, None if job.state == "RUNNING" else job.state.lower())
    if job.state == "CANCELLED":
        return Standing(CANCELLED, job.reason)
    return Standing(FAILED, _ended_badly(job))


def _ended_badly(job: JobState) -> str:
    named = {
        "TIMEOUT": f"its time limit of {job.time_limit} was over"
        if job.time_limit
        else "its time limit was over",
        "OUT_OF_MEMORY": "the node's memory did not suffice",
        "NODE_FAIL": f"its node {job.nodes or ''} failed".replace("  ", " "),
        "BOOT_FAIL": "its node did not boot",
        "PREEMPTED": "it was preempted, and not requeued",
        "DEADLINE": "its deadline was over",
        "COMPLETED": "its job ended without a verdict on the run",
    }.get(job.state)
    if named is not None:
        return named
    code = f"exit code {job.exit_code}" if job.exit_code and job.exit_code.isdigit() else job.exit_code
    return ", ".join(part for part in (job.state, code, job.reason) if part)


def silent_after(pace: float | None) -> float:
    """Seconds. pace: of a step."""
    return max(SILENT_SECONDS, SILENT_STEPS * (pace or 0.0))


def of_run(tail: RunTail, alive: bool | None, job: JobState | None, now: float) -> Standing:
    """alive: whether its process lives, None where that cannot be seen from here. job: the one that trains it. now:
    seconds since the epoch."""
    outcome = tail.verdict.get("outcome")
    state, problem = tail.record.state, tail.record.problem
    if alive and outcome in (None, "interrupted"):
        return Standing(STARTING, "goes on") if outcome else _lives(tail)
    if state == "unreadable":
        return Standing(UNREADABLE, problem)
    if outcome not in (None, "interrupted"):
        return _judged(tail, str(outcome), problem)
    if job is not None and job.waiting:
        begun = tail.step > 0 or bool(tail.attempts)
        return Standing(REQUEUED if begun else QUEUED, job.reason)
    if job is not None and job.active:
        return Standing(STARTING, "goes on") if outcome else _lives(tail)
    why = str(tail.verdict.get("message"))
    if job is not None and job.state == "CANCELLED":
        return Standing(
            CANCELLED, "; ".join([*filter(None, [job.reason]), *([why] if outcome else [])]) or None
        )
    if outcome == "interrupted":
        return Standing(INTERRUPTED, why if job is None else f"{why}; {_ended_badly(job)}")
    if job is not None:
        return Standing(FAILED, _ended_badly(job))
    if alive is None and now - tail.written <= silent_after(tail.pace):
        return _lives(tail)
    if alive is None:
        return Standing(SILENT, f"it was trained on {host(tail)}, which cannot be asked from here")
    return Standing(LOST, "its process is gone without a word: killed, or the machine went down")


def _lives(tail: RunTail) -> Standing:
    """Rows of the attempt before may stand there already."""
    begun = tail.attempts[-1].get("step", 0) if tail.attempts else 0
    return Standing(RUNNING) if tail.step > begun else Standing(STARTING)


def _judged(tail: RunTail, outcome: str, problem: str | None) -> Standing:
    if outcome == "completed":
        return Standing(DIVERGED, problem) if tail.record.state == "diverged" else Standing(COMPLETED)
    message = tail.verdict.get("message") or outcome
    if outcome == "non_finite":
        return Standing(DIVERGED, str(message))
    return Standing(STOPPED, f"{outcome}: {message}" if str(message) != outcome else outcome)


def host(tail: RunTail) -> str:
    return str(tail.attempts[-1].get("host", "another machine")) if tail.attempts else "another machine"


def job_of(tail: RunTail) -> str | None:
    """The name of the job of its last attempt (``SlurmJob.name``)."""
    job = tail.attempts[-1].get("slurm") if tail.attempts else None
    if not isinstance(job, Mapping) or not job.get("job"):
        return None
    array: Any = job.get("array_job")
    return str(job["job"]) if array is None else f"{array}_{job.get('array_task')}"


def seconds_left(tail: RunTail, standing: Standing, now: float) -> float | None:
    """Until its last step, at its pace: of a run that trains since it wrote last; None where no pace is known."""
    if tail.steps is None or tail.pace is None:
        return None
    left = (tail.steps - tail.step) * tail.pace
    return max(0.0, left - max(0.0, now - tail.written)) if standing.state == RUNNING else max(0.0, left)


def work_left(left: list[float | None], running: list[float]) -> float | None:
    """Seconds until all are done, as many at once as run now: none is done before the longest that runs, nor all before
    the sum of their work is shared out. left: of those under way; one that is not known counts as the mean of the others.
    None where none is known."""
    known = [x for x in left if x is not None]
    if not known:
        return None if left else 0.0
    total = math.fsum(known) + (len(left) - len(known)) * math.fsum(known) / len(known)
    return max([total / max(1, len(running)), *running])
