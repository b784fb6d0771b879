"""The last line of a batch script: whether SLURM should run the job again, and telling it so.

    srun qtrain train run=NAME resume=auto ...
    exec python -m qtrain.cluster.requeue $?

A run that a signal stopped has saved and ends with 75 (``qtrain.interrupts``). Who runs it again?

| what happened                         | state of the job then | again by                        |
|---------------------------------------|-----------------------|---------------------------------|
| the time limit is near (USR1)         | RUNNING               | this module: scontrol requeue   |
| preempted, with grace time (TERM)     | RUNNING               | this module: SLURM requeues only what it had to kill |
| preempted, without grace time         | COMPLETING, PREEMPTED | SLURM                           |
| a node failed                         | the script has died   | SLURM (``--requeue``)           |
| scancel, or beyond the time limit     | COMPLETING, CANCELLED, TIMEOUT | nobody                 |

This is asked in the batch script and not by rank 0 of the run: the script outlives the processes whatever order they die in,
also those that a signal killed before they had a handler (128 + its number), and it stands outside of a container,
where ``scontrol`` is. Measured with SLURM 22.05 (tests/cluster).
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from qtrain.cluster.slurm_job import SlurmJob

# qtrain.interrupts.TRY_AGAIN, and a shell's word for what died of the two signals before it could save
AGAIN = frozenset({75, 128 + signal.SIGUSR1, 128 + signal.SIGTERM})
# A job whose every attempt is stopped before its first step would come back for ever; a run of two weeks in jobs of four
# hours needs 84.
MOST_RESTARTS = 100
# The controller of a large cluster answers slowly when it is busy; a batch script has 30 seconds (KillWait) at least.
_SECONDS = 25.0


def scontrol(*words: str) -> str:
    """What ``scontrol`` prints. Raises RuntimeError with what it said where it fails or is not there."""
    command = ["scontrol", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except FileNotFoundError:
        raise RuntimeError(
            "there is no scontrol here: call this in the batch script, not inside of a container"
        ) from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{' '.join(command)} gave no answer within {_SECONDS:g} seconds") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def decide(code: int, restarts: int, job: Mapping[str, str], most: int = MOST_RESTARTS) -> tuple[bool, str]:
    """Whether to requeue, and why. code: exit status of the run. restarts: how often the job was requeued. job: what
    SLURM says of it (``JobState``, ``Requeue``)."""
    if code not in AGAIN:
        return False, f"exit code {code} does not ask for another attempt"
    state = job.get("JobState", "UNKNOWN")
    if state != "RUNNING":
        return False, f"the job is {state}: SLURM ends it by itself, and knows whether it runs again"
    if job.get("Requeue") == "0":
        return False, "the job was submitted with --no-requeue"
    if restarts >= most:
        return False, f"it was requeued {restarts} times, and {most} are allowed"
    return True, f"attempt {restarts + 1} was stopped by a signal and goes on"


def requeue(code: int, most: int, job: SlurmJob) -> bool:
    """Requeues ``job`` where that is due; says what was done on standard error. Raises RuntimeError where SLURM cannot
    be asked, or refuses."""
    known: dict[str, str] = {}
    if code in AGAIN:
        known = dict(re.findall(r"(\w+)=(\S*)", scontrol("-o", "show", "job", job.name)))
    again, why = decide(code, job.restarts, known, most)
    if again or code in AGAIN:
        print(
            f"qtrain: job {job.name} {'is requeued' if again else 'is not requeued'}: {why}",
            file=sys.stderr,
            flush=True,
        )
    if again:
        scontrol("requeue", job.name)
    return again


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the run's exit status, so that it is the script's as well, also where SLURM refused a requeue that was due."""
    parser = argparse.ArgumentParser(
        prog="python -m qtrain.cluster.requeue", description=__doc__.splitlines()[0]
    )
    parser.add_argument("code", type=int, help="the exit status of the run: $?")
    parser.add_argument(
        "--most", type=int, default=MOST_RESTARTS, help="how often a job is requeued (%(default)s)"
    )
    given = parser.parse_args(arguments)
    job = SlurmJob.here()
    if job is None:
        print("qtrain: no job of SLURM here: nothing to requeue", file=sys.stderr)
        return given.code
    try:
        requeue(given.code, given.most, job)
    except RuntimeError as error:
        print(f"qtrain: job {job.name} could not be requeued: {error}", file=sys.stderr)
    return given.code


if __name__ == "__main__":
    sys.exit(main())
