"""A run in a child process, as the command trains it, to be signalled and killed: for ``inject_faults.py`` and tests.

Forked, since importing torch anew takes seconds; the parent has to compute on one thread (a forked child inherits no
other).
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qtrain import interrupts
from qtrain.commands.train import run_rank
from qtrain.training.callbacks.metrics_jsonl import METRICS

PATIENCE_SECONDS = 120.0


def start(
    config: dict[str, Any],
    log: Path,
    prepare: Callable[[], None] = lambda: None,
    train: Callable[[dict[str, Any]], int] = run_rank,
) -> int:
    """Forks a child that trains ``config``, its output appended to ``log``. prepare: called in the child first. train:
    config -> exit code. Returns its pid."""
    assert torch.get_num_threads() == 1, "set OMP_NUM_THREADS=1"
    sys.stdout.flush()
    sys.stderr.flush()
    # From its first instruction on the child has its own handlers, or waits for them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, interrupts.SIGNALS)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        for signum in interrupts.SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
        with interrupts.listen():
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            prepare()
            code = train(config)
    except interrupts.Interrupted as stop:
        print(stop, file=sys.stderr)
        code = interrupts.exit_code(stop.signum)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """The child's exit code; minus the signal's number where one killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for(condition: Callable[[], bool], pid: int) -> None:
    """Until the condition holds; fails where the child ends before or takes too long."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < until, "the child takes too long"
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the child ended before"
        time.sleep(0.005)


def rows(folder: Path) -> int:
    """Complete lines of the metrics so far."""
    path = folder / METRICS
    return path.read_bytes().count(b"\n") if path.is_file() else 0
