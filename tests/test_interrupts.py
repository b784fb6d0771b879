"""A program that a signal stops ends within seconds, whatever is left running in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qtrain import interrupts

# What torch 2.11 leaves: its exit waits up to 300 s for a pool's process, which waits for a worker of its own
COMPILING = """
import atexit, subprocess, sys, threading, time
from qtrain import cli, commands
class Command:
    CONFIG = "bench"
    FORWARDS = {}
def compile_for_ever(arguments):
    pool = subprocess.Popen(["sh", "-c", "sleep 120 & echo $! > worker; wait"])
    atexit.register(pool.wait)
    threading.Thread(target=time.sleep, args=(120,)).start()
    print("compiling", flush=True)
    time.sleep(120)
Command.FORWARDS["kernels"] = compile_for_ever
sys.modules["compiling"] = Command
commands.ENTRIES["compiling"] = ("compiling", "never ends")
sys.exit(cli.main())
"""


def alive(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="children are found by /proc")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, interrupts.TRY_AGAIN), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
def test_threads_and_compile_workers_do_not_hold_the_exit(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", COMPILING, "compiling", "kernels"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "compiling\n"
    while not (tmp_path / "worker").is_file() or not (text := (tmp_path / "worker").read_text().strip()):
        time.sleep(0.05)
    worker = int(text)
    assert alive(worker)
    program.send_signal(number)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == code
    assert errors == f"interrupted by {number.name}\n"
    for _ in range(100):
        if not alive(worker):
            break
        time.sleep(0.1)
    assert not alive(worker), "what the program started ends with it"


def test_a_program_that_ends_by_itself_is_not_waited_for(tmp_path: Path) -> None:
    """A bound of the exit, no delay: with ten minutes' grace the process is gone at once, atexit functions included."""
    program = (
        "import atexit, sys\nfrom qtrain import interrupts\natexit.register(print, 'tidy')\n"
        "interrupts.end_soon(75, seconds=600)\nsys.exit(75)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr) == (75, "tidy\n", "")
