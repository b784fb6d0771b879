"""kill -9 of the command as a user types it, ``python -m qtrain.cli train ... resume=auto``, over and over."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import forked_run
from fault_trials import CORRUPTED, STEPS, SURVIVED, overrides, same, state_of, write_corpus

from qtrain.training.callbacks.metrics_jsonl import METRICS, read_metrics
from qtrain.training.run_folder import ATTEMPTS, read_lines

COMMAND_LINE = "kill -9 of the command"


def _started(root: Path, run: Path, more: list[str]) -> subprocess.Popen[bytes]:
    words = overrides(root / "corpus", root / "shards", run, *more)
    with (run.with_suffix(".log")).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "qtrain.cli", "train", *words], stdout=log, stderr=log, cwd=root
        )


def _steps(folder: Path) -> int:
    rows = read_metrics(folder / METRICS) if (folder / METRICS).is_file() else []
    return max((row["step"] for row in rows if row["kind"] == "train"), default=0)


def _attempts(folder: Path) -> list[int]:
    """From which step each start went on."""
    return [row["step"] for row in read_lines(folder / ATTEMPTS)] if (folder / ATTEMPTS).is_file() else []


def _kill(process: subprocess.Popen[bytes], folder: Path, draw: random.Random, seconds: float) -> int:
    """At any moment of the command or, three times of four, of its training. Returns the exit code."""
    if draw.random() < 0.25:
        moment = time.monotonic() + draw.uniform(0, seconds)
        while process.poll() is None and time.monotonic() < moment:
            time.sleep(0.01)
    else:
        rows = forked_run.rows(folder) + draw.randrange(1, STEPS // 2)
        while process.poll() is None and forked_run.rows(folder) < rows:
            time.sleep(0.003)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    return process.wait()


def command_line_campaign(
    kills: int, seed: int, more: list[str], progress: Callable[[int], None]
) -> list[tuple[str, tuple[int, ...], bool, int]]:
    """``kills`` kills, of as many runs as they take. Returns for each: how its run ended, the exit code, whether
    something was refused by name, the steps that had to be computed again."""
    root, draw = Path(tempfile.mkdtemp(prefix="qtrain-faults-")), random.Random(f"command/{seed}")
    write_corpus(root / "corpus")
    begun = time.monotonic()
    code = _started(root, root / "reference", more).wait()
    if code != 0:
        raise RuntimeError(f"the reference ended with {code}:\n{(root / 'reference.log').read_text()}")
    seconds, wanted = time.monotonic() - begun, state_of(root / "reference" / "train" / "one")
    found: list[tuple[str, tuple[int, ...], bool, int]] = []
    number, whole = 0, True
    while len(found) < kills:
        run, number = root / f"run-{number}", number + 1
        folder, done = run / "train" / "one", 0
        codes: list[int] = []
        lost: list[int] = []
        while True:
            process = _started(root, run, more)
            try:
                left = kills - len(found) - len(codes)
                code = _kill(process, folder, draw, seconds) if left else process.wait()
            except BaseException:
                process.kill()
                raise
            attempts = _attempts(folder)
            if len(lost) < len(codes):
                lost.append(max(0, done - attempts[-1]) if attempts else 0)
            if code != -signal.SIGKILL:
                break
            codes.append(code)
            done = _steps(folder)
            progress(len(found) + len(codes))
        log = run.with_suffix(".log").read_text(errors="replace")
        if code == 0:
            ended = SURVIVED if same(state_of(folder), wanted) else CORRUPTED
        else:
            ended = f"stuck: exit code {code}\n{log[-2000:]}"
        whole &= ended == SURVIVED
        found += [(ended, (c,), "refused: " in log, steps) for c, steps in zip(codes, lost, strict=True)]
        if ended != SURVIVED:
            break
    if whole:
        shutil.rmtree(root)
    return found
