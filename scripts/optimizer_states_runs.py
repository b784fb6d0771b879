"""The runs of the study of optimizer states: which arms there are, and how they are run, one process each.

A run is ``qtrain train experiment=optimizer_states name=ARM run=seedS resume=auto ...``. One that was killed goes on from
its checkpoint and one that completed is passed over, so that the study's own command is repeated after whatever happened.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtrain.training.run_folder import SUMMARY, VERDICT

BASELINE, PLACEBO = "baseline", "placebo"
EXPERIMENT = "optimizer_states"
CPU_TIME = "study_cpu_seconds"  # a file in a run's folder: a number a line, one for each attempt


@dataclass(frozen=True)
class Arm:
    """name: of the runs' folder. label: for the table. overrides: what it changes in the baseline."""

    name: str
    label: str
    overrides: tuple[str, ...] = ()


# Quantized in the forward, and the same operands again in the backward; gradients stay float32.
_W8A8 = ("recipe=all_gemms", "w=int8_row", "a=int8_row", "g=none")


def _activations(spec: str) -> tuple[str, ...]:
    return ("recipe=all_gemms", "w=none", f"a={spec}", "g=none", "recipe.linear.dgrad.weight=none")


# In order of importance: of a study that is broken off, the first seed's claims are there first.
ARMS = (
    Arm(BASELINE, "float32 everywhere"),
    Arm("m2_int8_tensor", "m2 int8 linear, one scale a tensor", ("m2=int8_tensor",)),
    Arm("m2_int8_row", "m2 int8 linear, a scale a row", ("m2=int8_row",)),
    Arm("m2_dynamic8", "m2 dynamic 8-bit, blocks of 128", ("m2=dynamic8_group128",)),
    Arm("m2_uint4", "m2 4-bit linear with zero, blocks of 128", ("m2=uint4_group128",)),
    Arm("m2_linear4_nozero", "m2 4-bit linear without zero, blocks of 128", ("m2=linear4_nozero_group128",)),
    Arm("a4_tensor", "activations int4, one scale a tensor", _activations("int4_tensor")),
    Arm("a4_token", "activations int4, a scale a token", _activations("int4_row")),
    Arm("w8a8", "weights and activations int8, a scale a row", _W8A8),
    # The same sums in another order: what a difference means that has no cause at all
    Arm(PLACEBO, "placebo: float32, two micro-batches a step", ("micro_batch_sequences=8",)),
    Arm("m1_int4_row", "m1 int4, a scale a row", ("m1=int4_row",)),
    Arm("m1_int4_tensor", "m1 int4, one scale a tensor", ("m1=int4_tensor",)),
)


@dataclass(frozen=True)
class Run:
    """One arm with one seed; ``folder`` is where it lies."""

    arm: Arm
    seed: int
    out: Path

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
        train = [sys.executable, "-m", "qtrain.cli", "train", f"experiment={EXPERIMENT}"]
        return [*train, *settings, *self.arm.overrides, *own]

    @property
    def completed(self) -> bool:
        verdict = self.folder / VERDICT
        if not (self.folder / SUMMARY).is_file() or not verdict.is_file():
            return False
        return json.loads(verdict.read_text(encoding="utf-8"))["outcome"] == "completed"

    def numbers(self) -> dict[str, Any]:
        """Its summary.json."""
        return json.loads((self.folder / SUMMARY).read_text(encoding="utf-8"))

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all its attempts; 0 where none was recorded."""
        path = self.folder / CPU_TIME
        return sum(map(float, path.read_text(encoding="utf-8").split())) if path.is_file() else 0.0


def runs_of(arms: Sequence[Arm], seeds: Sequence[int], out: Path) -> list[Run]:
    """All arms of the first seed, then of the next."""
    return [Run(arm, seed, out) for seed in seeds for arm in arms]


class RunFailed(Exception):
    """A run ended badly; the message names it, its command and its log."""


def _limit_threads() -> dict[str, str]:
    """One thread a process: two runs side by side are faster than two threads, and sums keep their order."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run_all(
    runs: Sequence[Run], workers: int, settings: Sequence[str] = (), say: Callable[[str], None] = print
) -> None:
    """Runs what is not completed, ``workers`` processes at a time. Ctrl-C, or a run that fails, ends the others, which
    save their state first. Raises RunFailed, naming the first run that failed."""
    left = [run for run in runs if not run.completed]
    if len(left) < len(runs):
        say(f"{len(runs) - len(left)} of {len(runs)} runs are completed already")
    running: dict[int, tuple[Run, subprocess.Popen[bytes], Path]] = {}
    begun, done = time.monotonic(), 0
    try:
        while left or running:
            while left and len(running) < workers:
                run = left.pop(0)
                process, log = _start(run, settings)
                running[process.pid] = run, process, log
            pid, status, usage = os.wait4(-1, 0)
            if pid not in running:
                continue
            run, process, log = running.pop(pid)
            process.returncode = os.waitstatus_to_exitcode(status)
            _record(run, usage)
            if process.returncode != 0 or not run.completed:
                raise RunFailed(_failure(run, process.returncode, settings, log))
            done += 1
            rest = len(left) + len(running)
            minutes = (time.monotonic() - begun) / done * rest / 60
            say(
                f"{run.name}: validation loss {run.numbers()['val_loss']:.4f} ({usage.ru_utime + usage.ru_stime:.0f} s "
                f"of processor time); {rest} runs left, about {minutes:.0f} min"
            )
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for run, process, _ in running.values():
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            _record(run, usage)


def _start(run: Run, settings: Sequence[str]) -> tuple[subprocess.Popen[bytes], Path]:
    log = run.out / "logs" / f"{run.arm.name}-seed{run.seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            run.command(settings), stdout=file, stderr=subprocess.STDOUT, env=_limit_threads()
        ), log


def _record(run: Run, usage: resource.struct_rusage) -> None:
    if run.folder.is_dir():
        with (run.folder / CPU_TIME).open("a", encoding="utf-8") as file:
            file.write(f"{usage.ru_utime + usage.ru_stime:.2f}\n")


def _failure(run: Run, code: int, settings: Sequence[str], log: Path) -> str:
    last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
    command = " ".join(["qtrain", *run.command(settings)[3:]])
    return "\n".join(
        [
            f"the run {run.name} ended with exit code {code}; its command:",
            f"  {command}",
            f"the end of {log}:",
        ]
        + [f"  {line}" for line in last]
    )
