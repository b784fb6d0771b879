"""The runs of a study: arms times seeds of one experiment, each a process of ``qtrain train``.

A run is ``qtrain train experiment=EXPERIMENT name=ARM run=seedS resume=auto ...``. One that was killed goes on from its
checkpoint and one that completed is passed over, so that a study's own command is repeated after whatever happened.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qtrain.training.run_folder import SUMMARY, VERDICT

BASELINE, PLACEBO = "baseline", "placebo"
CPU_TIME = "study_cpu_seconds"  # a file in a run's folder: a number a line, one for each attempt


@dataclass(frozen=True)
class Arm:
    """name: of the runs' folder. label: for the table. overrides: what it changes in the baseline. claimed: whether the
    study says beforehand what will come of it; the others run last. expected: the verdicts that were foreseen."""

    name: str
    label: str
    overrides: tuple[str, ...] = ()
    claimed: bool = True
    expected: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One arm of an experiment of configs/experiment with one seed; ``folder`` is where it lies."""

    arm: Arm
    seed: int
    out: Path
    experiment: str

    @property
    def name(self) -> str:
        return f"{self.arm.name}/seed{self.seed}"

    @property
    def folder(self) -> Path:
        return self.out / self.name

    def command(self, settings: Sequence[str] = ()) -> list[str]:
        """settings: overrides of all runs of a study, such as steps=2."""
        own = (
            f"name={self.arm.name}",
            f"run=seed{self.seed}",
            f"seed={self.seed}",
            f"out={self.out}",
            "resume=auto",
        )
        train = [sys.executable, "-m", "qtrain.cli", "train", f"experiment={self.experiment}"]
        return [*train, *settings, *self.arm.overrides, *own]

    @property
    def outcome(self) -> str | None:
        """How it ended: "completed" or "non_finite", which is a result too; None where it did not, or was cut off."""
        verdict = self.folder / VERDICT
        found = json.loads(verdict.read_text(encoding="utf-8"))["outcome"] if verdict.is_file() else None
        if found == "completed":
            return found if (self.folder / SUMMARY).is_file() else None
        return found if found == "non_finite" else None

    @property
    def val_loss(self) -> float:
        """Nats per token; infinite for a run whose numbers were."""
        if self.outcome == "non_finite":
            return math.inf
        return float(json.loads((self.folder / SUMMARY).read_text(encoding="utf-8"))["val_loss"])

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all its attempts; 0 where none was recorded."""
        path = self.folder / CPU_TIME
        return sum(map(float, path.read_text(encoding="utf-8").split())) if path.is_file() else 0.0


def runs_of(arms: Sequence[Arm], seeds: Sequence[int], out: Path, experiment: str) -> list[Run]:
    """In the order in which they run: arms that are claimed, seed after seed, then the rest."""
    return [
        Run(arm, seed, out, experiment)
        for claimed in (True, False)
        for seed in seeds
        for arm in arms
        if arm.claimed is claimed
    ]


class RunFailed(Exception):
    """A run ended badly; the message names it, its command and its log."""


@dataclass
class _Running:
    run: Run
    process: subprocess.Popen[bytes]
    log: Path

    def wait(self, options: int = 0) -> float | None:
        """Waits for its end, unless options says os.WNOHANG. Returns its processor time, and keeps it; None where it runs."""
        pid, status, usage = os.wait4(self.process.pid, options)
        if pid == 0:
            return None
        self.process.returncode = os.waitstatus_to_exitcode(status)
        seconds = usage.ru_utime + usage.ru_stime
        if self.run.folder.is_dir():
            with (self.run.folder / CPU_TIME).open("a", encoding="utf-8") as file:
                file.write(f"{seconds:.2f}\n")
        return seconds


def run_all(
    runs: Sequence[Run], workers: int, settings: Sequence[str] = (), say: Callable[[str], None] = print
) -> None:
    """Runs what has not ended, ``workers`` processes at a time. Ctrl-C, or a run that fails, ends the others, which
    save their state first. Raises RunFailed, naming the first run that failed."""
    left = [run for run in runs if run.outcome is None]
    if len(left) < len(runs):
        say(f"{len(runs) - len(left)} of {len(runs)} runs have ended already")
    running: list[_Running] = []
    begun, done = time.monotonic(), 0
    try:
        while left or running:
            while left and len(running) < workers:
                running.append(_start(left.pop(0), settings))
            ended, seconds = _next_ended(running)
            run = ended.run
            if run.outcome is None:
                raise RunFailed(_failure(ended, settings))
            done += 1
            rest = len(left) + len(running)
            minutes = (time.monotonic() - begun) / done * rest / 60
            found = f"{run.name}: validation loss {run.val_loss:.4f} ({seconds:.0f} s of processor time)"
            say(f"{found}; {rest} runs left, about {minutes:.0f} min")
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.wait()


def _next_ended(running: list[_Running]) -> tuple[_Running, float]:
    """Takes the first that has ended out of the list: it, and its processor time."""
    while True:
        for one in running:
            if (seconds := one.wait(os.WNOHANG)) is not None:
                running.remove(one)
                return one, seconds
        time.sleep(0.2)  # short beside a run


def _start(run: Run, settings: Sequence[str]) -> _Running:
    log = run.out / "logs" / f"{run.arm.name}-seed{run.seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # One thread a process: two runs side by side are faster than two threads, and sums keep their order
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        process = subprocess.Popen(run.command(settings), stdout=file, stderr=subprocess.STDOUT, env=env)
    return _Running(run, process, log)


def _failure(ended: _Running, settings: Sequence[str]) -> str:
    run, last = ended.run, ended.log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
    lines = [
        f"the run {run.name} ended with exit code {ended.process.returncode}; its command:",
        f"  {' '.join(['qtrain', *run.command(settings)[3:]])}",
        f"the end of {ended.log}:",
        *(f"  {line}" for line in last),
    ]
    return "\n".join(lines)
