"""What SLURM says of jobs: in its queue, in its memory of the last minutes, in its accounts.

    squeue     pending, running, and what ended within MinJobAge (300 s, unless the site says otherwise)
    sacct      what ended before, and exit codes; needs slurmdbd, which not every site runs
    scontrol   exit codes, as long as squeue shows the job; asked where there are no accounts

All are asked in formats for programs, once for all jobs, and given some seconds: a controller that is down or busy makes
them hang. What could not be asked is a note, not an error.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

# For one command. SLURM's own tools wait MessageTimeout, 10 s, for their controller, and then try again.
SECONDS = 15.0
# Jobs in one command line: ids of 8 digits stay far below the least limit of a line (POSIX: 4096 bytes)
_AT_ONCE = 200
# Jobs whose exit code is asked of scontrol, which takes one at a time
_DETAILS = 20

WAITING = frozenset(("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"))
ACTIVE = frozenset((
    "RUNNING", "COMPLETING", "CONFIGURING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED",
))  # fmt: skip

_SQUEUE = "%i|%A|%T|%P|%N|%M|%l|%r"  # the reason is free text, and last
_SACCT = "JobID,JobIDRaw,State,Partition,NodeList,Elapsed,Timelimit,ExitCode"
_NOTHING = frozenset(("", "None", "(null)", "N/A", "None assigned", "Unknown", "Partition_Limit"))


@dataclass(frozen=True)
class JobState:
    """name: 120_3, or 123. job: its own number. state: SLURM's word, ``PENDING``, ``TIMEOUT``, .... reason: of a job that
    waits, why; of one that ended, what SLURM adds. exit_code: ``3``, or ``signal 9``; None where it is 0 or not known.
    elapsed, time_limit: as SLURM writes them, days-hours:minutes:seconds."""

    name: str
    job: str
    state: str
    reason: str | None = None
    partition: str | None = None
    nodes: str | None = None
    elapsed: str | None = None
    time_limit: str | None = None
    exit_code: str | None = None

    @property
    def waiting(self) -> bool:
        return self.state in WAITING

    @property
    def active(self) -> bool:
        return self.state in ACTIVE

    @property
    def ended(self) -> bool:
        return not (self.waiting or self.active)


@dataclass(frozen=True)
class Queue:
    """jobs: by name; a job that is missing is unknown to SLURM, or could not be asked for. notes: what could not be
    asked, a sentence each. asked: whether squeue answered."""

    jobs: Mapping[str, JobState] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    asked: bool = False


class _Failed(Exception):
    pass


def _ask(command: Sequence[str], seconds: float) -> str:
    """What the command prints. Raises _Failed, with a sentence, where it is missing, fails or takes too long."""
    if shutil.which(command[0]) is None:
        raise _Failed(f"there is no {command[0]} on this machine")
    # SQUEUE_USERS, SACCT_FORMAT and the like change what is answered
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SACCT_", "SCONTROL_"))}
    try:
        process = subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:  # a wrapper without its first line, or that is being replaced
        raise _Failed(f"{command[0]} could not be started ({error})") from error
    try:
        out, err = process.communicate(timeout=seconds)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)  # and what a wrapper of the site's has started
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise _Failed(f"{command[0]} did not answer within {seconds:g} s and was ended") from None
        raise
    if process.returncode:
        said = err.strip().splitlines() or [f"exit code {process.returncode}"]
        raise _Failed(f"{command[0]} failed: {said[-1].removeprefix(f'{command[0]}: error: ')}")
    return out


def _known(text: str) -> str | None:
    return None if text.strip() in _NOTHING else text.strip()


def _exit_code(text: str) -> str | None:
    """``3:0`` is exit code 3, ``0:9`` signal 9."""
    found = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if found is None or found[0] == "0:0":
        return None
    return f"signal {found[2]}" if found[2] != "0" else found[1]


def _squeue_row(line: str) -> JobState | None:
    cells = line.split("|", 7)
    if len(cells) < 8:
        return None
    name, job, state, partition, nodes, elapsed, limit, reason = (cell.strip() for cell in cells)
    return JobState(
        name=name, job=job, state=state, partition=_known(partition), nodes=_known(nodes), elapsed=_known(elapsed),
        time_limit=_known(limit),
        reason=None if state == "CANCELLED" else _known(reason),  # why it had waited before
    )  # fmt: skip


def _sacct_row(line: str) -> JobState | None:
    cells = line.split("|")
    if len(cells) != 8:
        return None
    name, job, state, partition, nodes, elapsed, limit, code = cells
    # "CANCELLED by 1000", of the user with that number; "CANCELLED+" where a site cuts it
    word, _, by = state.partition(" ")
    return JobState(
        name=name, job=job, state=word.rstrip("+"), reason=_canceller(by), partition=_known(partition),
        nodes=_known(nodes), elapsed=_known(elapsed), time_limit=_known(limit), exit_code=_exit_code(code),
    )  # fmt: skip


def _canceller(by: str) -> str | None:
    number = by.removeprefix("by ").strip()
    if not number.isdigit():
        return by.strip() or None
    import pwd

    try:
        return f"by {pwd.getpwuid(int(number)).pw_name}"
    except KeyError:
        return f"by user {number}"


def _whole_jobs(names: Iterable[str]) -> list[str]:
    """The jobs and arrays of these names, each once."""
    return list(dict.fromkeys(name.partition("_")[0] for name in names))


def _from_squeue(names: Sequence[str], seconds: float) -> dict[str, JobState]:
    jobs, found = _whole_jobs(names), {}
    for start in range(0, len(jobs), _AT_ONCE):
        some = ",".join(jobs[start : start + _AT_ONCE])
        command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={some}", f"--format={_SQUEUE}"]
        try:
            lines = _ask(command, seconds).splitlines()
        except _Failed as failure:
            if "Invalid job id" in str(failure):  # it has forgotten the one that it was asked for
                continue
            raise
        rows = [row for line in lines if (row := _squeue_row(line)) is not None]
        found.update({row.name: row for row in rows})
    return found


def _from_sacct(names: Sequence[str], seconds: float) -> dict[str, JobState]:
    jobs, found = _whole_jobs(names), {}
    for start in range(0, len(jobs), _AT_ONCE):
        some = ",".join(jobs[start : start + _AT_ONCE])
        command = [
            "sacct",
            "--noheader",
            "--parsable2",
            "--allocations",
            f"--jobs={some}",
            f"--format={_SACCT}",
        ]
        rows = [row for line in _ask(command, seconds).splitlines() if (row := _sacct_row(line)) is not None]
        found.update({row.name: row for row in rows})
    return found


def _exit_codes(names: Sequence[str], seconds: float) -> tuple[dict[str, str], list[str]]:
    """(exit codes by scontrol, of jobs that ended lately; notes)."""
    found: dict[str, str] = {}
    notes = []
    if names[_DETAILS:]:
        notes.append(f"exit codes of {_listed(names[_DETAILS:])} were not asked for: {_DETAILS} at once are")
    for name in names[:_DETAILS]:
        try:
            text = _ask(["scontrol", "--oneliner", "show", "job", name], seconds)
        except _Failed as failure:
            if "Invalid job id" in str(failure):  # it has forgotten this one, and knows others
                notes.append(f"{failure}: the exit code of job {name} is not known")
                continue
            return found, [*notes, f"{failure}: exit codes are not known"]
        code = re.search(r"\bExitCode=(\d+:\d+)", text)
        if code and (said := _exit_code(code[1])):
            found[name] = said
    return found, notes


def ask_slurm(names: Iterable[str], *, seconds: float = SECONDS) -> Queue:
    """The states of these jobs (``SlurmJob.name``). Asks nothing where there are none. seconds: for one command.

    Never raises for what SLURM does; see ``Queue.notes``.
    """
    wanted = list(dict.fromkeys(names))
    if not wanted:
        return Queue()
    notes: list[str] = []
    found: dict[str, JobState] = {}
    asked = True
    try:
        found = _from_squeue(wanted, seconds)
    except _Failed as failure:
        asked = False
        notes.append(f"{failure}: which of {len(wanted)} jobs wait or run is not known")
    found = {name: found[name] for name in wanted if name in found}
    unclear = [n for n in wanted if n not in found or (found[n].ended and found[n].state != "COMPLETED")]
    if not unclear or not (asked or shutil.which("sacct")):
        return Queue(found, tuple(notes), asked)
    try:
        accounts = _from_sacct(unclear, seconds)
    except _Failed as failure:
        lost = [n for n in unclear if n not in found]
        if lost:
            notes.append(f"{failure}: how {_listed(lost)} ended is known from the runs and their logs alone")
        accounts = {}
        codes, more = _exit_codes([n for n in unclear if n in found], seconds)
        notes += more
        found.update({n: replace(found[n], exit_code=code) for n, code in codes.items()})
    for name in unclear:
        if name in accounts and name in found:
            of_accounts = accounts[name]
            reason = of_accounts.reason or found[name].reason
            found[name] = replace(found[name], exit_code=of_accounts.exit_code, reason=reason)
        elif name in accounts:
            found[name] = accounts[name]
    return Queue(found, tuple(notes), asked)


def _listed(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"job {names[0]}"
    return f"{len(names)} jobs ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
