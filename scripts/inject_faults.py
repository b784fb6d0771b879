"""Faults, injected into real runs at seeded moments and places; what became of each run, as a table.

    python scripts/inject_faults.py --faults 500 --seed 0 --workers 2 --table docs/reliability.md
    python scripts/inject_faults.py --faults 40 --only "kill -9" --only "bit flipped"
    python scripts/inject_faults.py --command-line --faults 15

A run of 12 small steps (stochastic rounding, dropout, accumulation, 8-bit states, a checkpoint every third) is
disturbed, and started again by the same command (resume=auto) until it is complete. It survived if its weights, its
packed optimizer states and its whole curve are then, bit for bit, those of an undisturbed run. A run that completes
otherwise is silently corrupted. What nothing can go on from (all checkpoints damaged, other tokens) must be refused by
name and change nothing; it is then undone. A stack trace is no way to end. The exit status is 1 unless all survived.

--journal keeps the outcomes, so that a campaign that was interrupted goes on. --command-line kills the real command
(``python -m qtrain.cli train``) instead of forked children, each start of which imports torch anew.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: forked children inherit no thread

import argparse
import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import faults_of_files
import faults_of_processes  # noqa: F401
import torch
from fault_command_line import COMMAND_LINE, command_line_campaign
from fault_trials import CORRUPTED, EVERY, FAULTS, RARE, STEPS, SURVIVED, Lab, Trial
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qtrain.training.worker import end_with

BEGIN, END = "<!-- fault table: begin -->", "<!-- fault table: end -->"
# How a disturbed process ended, by its exit code
_ENDS = {0: "completed", 2: "refused", 3: "verdict", 75: "saved (75)", 130: "stopped (130)", 137: "137", -9: "killed"}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """Of one fault. ended: ``survived``, ``silently corrupted``, or a sentence about what was wrong. codes: exit
    codes, all but that of the last start. refused: something was, by name. lost: steps computed again."""

    number: int
    kind: str
    ended: str
    codes: tuple[int, ...]
    refused: bool
    lost: int


def planned(kinds: list[str], faults: int) -> list[str]:
    """Which kind each fault is: the kinds in turns, rare ones but a few times."""
    plan: list[str] = []
    while len(plan) < faults:
        turn = [k for k in kinds if plan.count(k) < RARE.get(k, faults)]
        if not turn:
            raise ValueError(f"{faults} faults of {', '.join(kinds)} alone: at most {len(plan)} are injected")
        plan += turn[: faults - len(plan)]
    return plan


def campaign(lab: Lab, plan: list[str], seed: int, numbers: Iterable[int]) -> Iterator[Outcome]:
    """Injects those faults of ``plan``. The folder of one that was not survived is left."""
    for number in numbers:
        trial = Trial(lab, random.Random(f"{seed}/{number}"), lab.root / f"trial-{number}")
        try:
            ended = FAULTS[plan[number]](trial) or trial.finish()
        finally:
            trial.end()
        codes = tuple(trial.codes[:-1] if ended in (SURVIVED, CORRUPTED) else trial.codes)
        if ended == SURVIVED:
            lost = trial.lost
            refused = trial.refused
            shutil.rmtree(trial.out)
        else:
            lost, refused, ended = trial.lost, trial.refused, f"{ended}\n(left in {trial.out})"
            ended = CORRUPTED if ended.startswith(CORRUPTED) else ended
        yield Outcome(number, plan[number], ended, codes, refused, lost)


def read_journal(path: Path) -> list[Outcome]:
    """The outcomes so far; not a last line that was cut."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [Outcome(**{**json.loads(line), "codes": tuple(json.loads(line)["codes"])}) for line in lines]


def _work(plan: list[str], seed: int, numbers: list[int], journal: Path) -> None:
    """A worker's share, an outcome a line."""
    lab = Lab(Path(tempfile.mkdtemp(prefix="qtrain-faults-")))
    lab.build()
    whole = True
    with journal.open("a", encoding="utf-8") as file:
        for outcome in campaign(lab, plan, seed, numbers):
            whole &= outcome.ended == SURVIVED
            file.write(json.dumps(asdict(outcome)) + "\n")
            file.flush()
    if whole:
        shutil.rmtree(lab.root)


def shared_campaign(plan: list[str], seed: int, workers: int, folder: Path) -> list[Outcome]:
    """The campaign by several processes of this script, which journal in ``folder``; goes on where these end."""
    folder.mkdir(parents=True, exist_ok=True)
    described = json.dumps({"plan": plan, "seed": seed})
    if (folder / "plan.json").is_file() and (folder / "plan.json").read_text() != described:
        raise ValueError(f"{folder} is the journal of another campaign; name another --journal")
    (folder / "plan.json").write_text(described)

    def outcomes() -> list[Outcome]:
        return [o for path in sorted(folder.glob("*.jsonl")) for o in read_journal(path)]

    done = {o.number for o in outcomes()}
    left = [n for n in range(len(plan)) if n not in done]
    started = []
    try:
        for i in range(workers):
            task = {"parent": os.getpid(), "plan": plan, "seed": seed, "numbers": left[i::workers]}
            journal = folder / f"{time.time_ns()}-{i}.jsonl"
            command = [sys.executable, __file__, "--worker", str(journal)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
            started.append(process)
            assert process.stdin is not None
            with process.stdin as pipe:
                pipe.write(json.dumps(task))
        with _bar(len(plan)) as show:
            while any(process.poll() is None for process in started):
                show(len(outcomes()))
                time.sleep(0.5)
            show(len(outcomes()))
    finally:
        for process in started:
            process.terminate()
            process.wait()
    if failed := [p.returncode for p in started if p.returncode]:
        raise RuntimeError(f"a worker ended with exit code {failed[0]}; the same --journal goes on")
    return sorted(outcomes(), key=lambda o: o.number)


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left; without a terminal, lines."""
    console, begun = Console(stderr=True), time.monotonic()
    columns = (TextColumn("faults"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task, shown, first = progress.add_task("", total=total), [begun], [-1]

        def show(done: int) -> None:
            progress.update(task, completed=done)
            first[0] = done if first[0] < 0 else first[0]
            if not console.is_terminal and time.monotonic() - shown[0] > 30:
                shown[0] = time.monotonic()
                left = (shown[0] - begun) / max(1, done - first[0]) * (total - done)
                print(f"{done} of {total} faults, {left:.0f} s left", file=sys.stderr, flush=True)

        yield show


def _described(codes: list[int]) -> str:
    counts = Counter(_ENDS.get(code, f"exit code {code}") for code in codes)
    return ", ".join(f"{name} {n}" for name, n in counts.most_common()) or "went on"


def _cells(found: list[Outcome]) -> list[str]:
    lost = [o.lost for o in found]
    return [
        str(len(found)),
        str(sum(o.ended == SURVIVED for o in found)),
        str(sum(o.refused for o in found)),
        f"{sum(lost) / max(len(lost), 1):.1f}",
        str(max(lost, default=0)),
        str(sum(o.ended == CORRUPTED for o in found)),
    ]


def _commit() -> str:
    """Of the checkout, shortened; marked where tracked files differ."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def table(outcomes: list[Outcome], command: str, skipped: str | None = None) -> str:
    header = ["fault", "injected", "survived", "refused by name", "steps again: mean", "most", "silently corrupted",
              "how the disturbed process ended"]  # fmt: skip
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [f"`{command}`, commit {_commit()}: runs of {STEPS} steps, a checkpoint every {EVERY}; torch "
             f"{torch.__version__} on CPU, {cores} cores.", ""]  # fmt: skip
    lines += [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for kind in dict.fromkeys(o.kind for o in outcomes):
        found = [o for o in outcomes if o.kind == kind]
        ends = _described([code for o in found for code in o.codes])
        lines.append(f"| {kind} | {' | '.join(_cells(found))} | {ends} |")
    lines.append(f"| **all** | {' | '.join(_cells(outcomes))} | |")
    return "\n".join([*lines, *(["", f"Left out: {skipped}."] if skipped else [])])


def insert(path: Path, text: str) -> None:
    """Puts the table between its marks."""
    page = path.read_text(encoding="utf-8")
    if BEGIN not in page or END not in page:
        raise ValueError(f"{path} has no marks {BEGIN} and {END}: nothing says where the table belongs")
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    path.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}", encoding="utf-8")


def _options(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], help="part of a kind's name; repeatable")
    parser.add_argument("--table", type=Path, help="a page with the table's marks")
    parser.add_argument("--json", type=Path, help="a file for the outcomes")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the faults")
    parser.add_argument("--journal", type=Path, help="a folder of outcomes, from which a campaign goes on")
    parser.add_argument("--command-line", action="store_true", help="kill -9 of the real command only")
    parser.add_argument(
        "--override", action="append", default=[], help="with --command-line: trainer=ddp, ..."
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    kinds = [k for k in FAULTS if not options.only or any(part in k for part in options.only)]
    if not kinds:
        parser.error(f"--only {options.only}: the kinds are {', '.join(FAULTS)}")
    if options.override and not options.command_line:
        parser.error("--override goes with --command-line")
    return options, kinds


def _command(options: argparse.Namespace) -> str:
    words = ["python scripts/inject_faults.py", f"--faults {options.faults}", f"--seed {options.seed}"]
    words += ["--command-line"] if options.command_line else []
    words += [f'--only "{part}"' for part in options.only] + [f"--override {o}" for o in options.override]
    return " ".join(words)


def main(arguments: list[str] | None = None) -> int:
    options, kinds = _options(arguments)
    if options.worker is not None:
        task = json.load(sys.stdin)
        end_with(task.pop("parent"))
        _work(**task, journal=options.worker)
        return 0
    skipped = None
    if options.command_line:
        with _bar(options.faults) as show:
            found = command_line_campaign(options.faults, options.seed, options.override, show)
            outcomes = [Outcome(i, COMMAND_LINE, *one) for i, one in enumerate(found)]
    else:
        if faults_of_files.TMPFS in kinds and not faults_of_files.can_mount():
            kinds.remove(faults_of_files.TMPFS)
            skipped = f"{faults_of_files.TMPFS} (this user may not mount one)"
        with tempfile.TemporaryDirectory() as folder:
            journal = options.journal or Path(folder)
            outcomes = shared_campaign(planned(kinds, options.faults), options.seed, options.workers, journal)
    text = table(outcomes, _command(options), skipped)
    print(text)
    if options.table is not None:
        insert(options.table, text)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1))
    problems = [o for o in outcomes if o.ended != SURVIVED]
    for o in problems:
        print(f"fault {o.number}, {o.kind}: {o.ended}", file=sys.stderr)
    return 1 if problems else 0


def _ended(signum: int, frame: object) -> None:
    sys.exit(128 + signum)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _ended)  # what was started is ended too, file systems are given back
    sys.exit(main())
