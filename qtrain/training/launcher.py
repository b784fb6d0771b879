"""Starting the processes of a run on this machine, and being their parent.

Each gets torchrun's environment variables and, on its standard input, what to do: a configuration that is already
composed and checked, so that sweeps and configs from elsewhere need no second composition, and nobody reads it in
the list of processes. Only rank 0 owns the terminal; what the others print comes to standard error, marked.

The parent passes on SIGTERM, SIGUSR1 and SIGINT, each as often as it gets it. The children live in sessions of their
own, so that a terminal's Ctrl-C does not reach them twice. When one dies, the others get some seconds to end by
themselves (most wait for the dead one), then SIGTERM, then SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from qtrain.interrupts import SIGNALS, Interrupted

# For the others to end by themselves after one has: rank 0 may be writing a trace, and Python's exit takes a second.
GRACE_SECONDS = 15.0
# Between SIGTERM and SIGKILL.
KILL_SECONDS = 5.0
_POLL_SECONDS = 0.05

# The directory that Python puts first for -c is the working one, where a file may be named like a module of the
# library: it goes before anything is imported.
_BOOTSTRAP = (
    "import sys\n"
    "if sys.path[:1] == ['']: del sys.path[0]\n"
    "import json\n"
    "task = json.load(sys.stdin)\n"
    "sys.path[:] = task['path']\n"
    "from qtrain.training.worker import work\n"
    "sys.exit(work(task))\n"
)


def launch(
    config: Mapping[str, Any], entry: str, processes: int, *, grace_seconds: float = GRACE_SECONDS
) -> int:
    """Runs ``entry`` (``package.module:function``, config -> exit status) in ``processes`` processes. Returns the
    exit status: 0 where all ended with 0, else that of the first that did not, 128 + n for one that signal n killed.

    config: of JSON's types; raises ValueError where JSON would change it. After a signal raises Interrupted, once all
    children have ended: a sweep then starts no other run.
    """
    task = _task(config, entry)
    children: list[subprocess.Popen[bytes]] = []
    readers: list[threading.Thread] = []
    with _received() as signals:
        try:
            variables = _shared_variables(processes)
            for rank in range(processes):
                child = _start(rank, variables, task)
                children.append(child)
                if rank:
                    readers.append(_mark(child, rank))
            status = _watch(children, signals, grace_seconds)
        finally:
            _end(children)
            for reader in readers:
                reader.join(timeout=1.0)
    if signals.seen:
        raise Interrupted(signals.seen[0])
    return status


def _task(config: Mapping[str, Any], entry: str) -> bytes:
    text = json.dumps({"parent": os.getpid(), "path": sys.path, "entry": entry, "config": config})
    # As text, since nan is not equal to itself
    if repr(json.loads(text)["config"]) != repr(config):
        raise ValueError(
            "the configuration holds something other than dicts with string keys, lists, strings, numbers and null; "
            "write it so that it can be handed to other processes"
        )
    return text.encode()


def _free_port() -> int:
    """One that nobody listens on now; torch binds it a moment later."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _shared_variables(processes: int) -> dict[str, str]:
    """The environment of all children."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        **os.environ,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "TORCHELASTIC_RUN_ID": uuid.uuid4().hex,
    }


def _start(rank: int, variables: Mapping[str, str], task: bytes) -> subprocess.Popen[bytes]:
    sys.stdout.flush()
    child = subprocess.Popen(
        [sys.executable, "-c", _BOOTSTRAP, "qtrain", f"rank={rank}"],
        stdin=subprocess.PIPE,
        stdout=None if rank == 0 else subprocess.PIPE,
        stderr=None if rank == 0 else subprocess.STDOUT,
        env={**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        start_new_session=True,
    )
    assert child.stdin is not None
    # A child that died before it read shows in its exit status
    with contextlib.suppress(BrokenPipeError), child.stdin as pipe:
        pipe.write(task)
    return child


def _mark(child: subprocess.Popen[bytes], rank: int) -> threading.Thread:
    """Copies the lines of a child's output to standard error, each with its rank."""

    def copy() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            sys.stderr.write(f"[rank {rank}] {line.decode(errors='replace')}")
            sys.stderr.flush()

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


class _Signals:
    """What arrived and is not passed on yet, and all that arrived."""

    def __init__(self) -> None:
        self.waiting: deque[int] = deque()
        self.seen: list[int] = []

    def take(self, number: int, frame: Any) -> None:
        self.waiting.append(number)
        self.seen.append(number)


@contextlib.contextmanager
def _received() -> Iterator[_Signals]:
    """Collects the signals to be passed on; Python handles signals in the main thread only."""
    signals = _Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals.take) for number in SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(children: list[subprocess.Popen[bytes]], signals: _Signals, grace_seconds: float) -> int:
    """Waits for all children, passes signals on, ends those that outlive a dead one. Returns the exit status."""
    failed: tuple[int, int] | None = None
    harder = [signal.SIGTERM, signal.SIGKILL]
    due = float("inf")
    while True:
        codes = [child.poll() for child in children]
        if failed is None:
            failed = next(((i, code) for i, code in enumerate(codes) if code), None)
            if failed is not None:
                due = time.monotonic() + grace_seconds
        alive = [child for child, code in zip(children, codes, strict=True) if code is None]
        if not alive:
            break
        if signals.waiting:  # one at a time: two of a kind at once would arrive as one
            number = signals.waiting.popleft()
            for child in alive:
                child.send_signal(number)
        if failed is not None and time.monotonic() > due and harder:
            number = harder.pop(0)
            ranks = ", ".join(str(children.index(child)) for child in alive)
            print(
                f"rank {failed[0]} {_described(failed[1])}; {signal.Signals(number).name} to rank {ranks}",
                file=sys.stderr,
            )
            for child in alive:
                child.send_signal(number)
            due = time.monotonic() + KILL_SECONDS
        time.sleep(_POLL_SECONDS)
    if failed is None:
        return 0
    rank, code = failed
    if code < 0:
        print(f"rank {rank} {_described(code)}", file=sys.stderr)
    return code if code > 0 else 128 - code


def _described(code: int) -> str:
    return f"ended with exit code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    """Kills what is left of the children and of what they started (each leads a process group)."""
    for child in children:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
