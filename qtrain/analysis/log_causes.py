"""Why a run failed, by the last lines of its log: which line tells, what it means, and what to do next."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Of the end of a log: a stack trace through torch and Lightning is some 10 KiB
_TAIL = 48 << 10
_LONGEST = 300  # characters of a line that is shown
_LOGS = 16  # processes of one job whose logs are read


@dataclass(frozen=True)
class Cause:
    """kind: of KINDS. line: the telling one. log: where it stands."""

    kind: str
    line: str
    log: Path | None = None

    @property
    def remedy(self) -> str:
        return KINDS[self.kind]


KINDS = {
    "gpu memory": "halve micro_batch_sequences, or saved=quantized, activation_checkpointing=true, trainer=fsdp2",
    "memory": "ask for more memory (--mem), or halve micro_batch_sequences",
    "time limit": "go on from its last checkpoint; a lower checkpoint_every_steps loses less, a signal before the limit nothing",
    "cancelled": "go on from its last checkpoint, if it was not meant",
    "preempted": "submit it with --requeue, and it goes on by itself",
    "node failure": "go on from its last checkpoint, on another node (--exclude)",
    "disk": "make room, and go on from its last checkpoint",
    "refused": "mend what the line names",
    "crash": "a process of it was killed by the signal that the line names: see dmesg on its node",
    "error": "see the trace in the log, and go on from its last checkpoint once it is mended",
    "unknown": "read the log",
}
"""kind -> what to do about it."""

# The first that a line matches is its kind; among the lines the first kind of this order wins, the last line of it
_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        # slurmstepd's words, SLURM 22.05
        ("time limit", r"CANCELLED AT \S+ DUE TO TIME LIMIT"),
        ("preempted", r"CANCELLED AT \S+ DUE TO PREEMPTION"),
        ("node failure", r"CANCELLED AT \S+ DUE TO NODE FAILURE"),
        ("memory", r"oom[-_]kill|Out Of Memory|Exceeded job memory limit|\bMemoryError|DefaultCPUAllocator: can't allocate"),
        ("gpu memory", r"CUDA out of memory|torch\.OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED"),
        ("disk", r"No space left on device|Disk quota exceeded"),
        ("cancelled", r"\*\*\* (JOB|STEP) \S+ ON \S+ CANCELLED AT \S+ \*\*\*"),
        ("refused", r"^qtrain: "),
        ("error", r"^(?!\s)[\w.]*(Error|Exception|Interrupt|Failed|Refused)\b(:|$)"),
        ("crash", r"Segmentation fault|Bus error|Illegal instruction|core dumped|\bKilled$|exited with signal|died with <Signals"),
    )
)  # fmt: skip


def end_of(log: Path) -> list[str]:
    """The last lines of a log; none where it cannot be read."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL))
            text = file.read(_TAIL).decode("utf-8", "replace")
    except OSError:
        return []
    # A progress bar's carriage returns leave what a terminal would show
    return [line.rsplit("\r", 1)[-1].rstrip() for line in text.split("\n") if line.strip()]


# What SLURM writes where it ends an attempt; a requeued job appends to the same log
_END_OF_ATTEMPT = re.compile(r"\*\*\* (JOB|STEP) \S+ ON \S+ CANCELLED AT ")


def last_attempt(lines: Sequence[str]) -> list[str]:
    """Of a log to which several attempts wrote, the last one's lines."""
    ends = [i for i, line in enumerate(lines) if _END_OF_ATTEMPT.search(line)]
    begun = [i for i in ends if any(not _END_OF_ATTEMPT.search(line) for line in lines[i + 1 :])]
    return list(lines[begun[-1] + 1 :]) if begun else list(lines)


def logs_beside(log: Path) -> list[Path]:
    """The logs of all processes of a job, this one first: submitit writes JOB_TASK_log.out, sbatch what it is told."""
    found = re.fullmatch(r"(.+)_\d+_log\.(out|err)", log.name)
    others = sorted(log.parent.glob(f"{found[1]}_*_log.*")) if found else [log.with_suffix(".err")]
    return [path for path in dict.fromkeys((log, *others)) if path.is_file()][:_LOGS]


def cause_in(logs: Sequence[Path]) -> Cause | None:
    """The cause that the logs tell of; None where there is nothing in them."""
    ends = [(log, last_attempt(end_of(log))) for log in logs]
    for kind, pattern in _PATTERNS:
        for log, lines in ends:
            found = [line for line in lines if pattern.search(line)]
            if found:
                return Cause(kind, _shortened(found[-1]), log)
    last = next(((log, lines[-1]) for log, lines in ends if lines), None)
    return None if last is None else Cause("unknown", _shortened(last[1]), last[0])


def _shortened(line: str) -> str:
    line = line.strip()
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
