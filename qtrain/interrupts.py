"""Signals that ask a run to stop, from its first moment on.

    SIGTERM, SIGUSR1   the machine will be taken away: save, and stop
    SIGINT (Ctrl-C)    the same; a second one stops at once

Batch systems send them early, and an unhandled one kills: the handlers are installed before anything slow is imported.
While a run trains a signal is noted (``defer``) and asked for when a step is whole (``pending``); at any other time
there is nothing to save, and it raises ``Interrupted`` where it arrives. A program that ends by that ends within seconds
(``end_soon``): Python's exit waits for threads and for what libraries registered, and Inductor's pool of compile workers
waits there up to 300 seconds for kernels that nobody will run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
# sysexits.h EX_TEMPFAIL: what batch scripts read as "try again"
TRY_AGAIN = 75
# For Python's own exit after a signal. `timeout --kill-after` and batch systems kill after 10 to 30 seconds.
EXIT_SECONDS = 5.0


class Interrupted(BaseException):
    """A signal arrived where nothing can be saved. No Exception: nobody handles it by accident."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


class _Inbox:
    listening = False
    deferred = False
    pending: int | None = None


_inbox = _Inbox()


def exit_code(signum: int) -> int:
    """Of a program that a signal stopped: 130 after Ctrl-C, as shells have it, else 75 (try again)."""
    return 128 + signal.SIGINT if signum == signal.SIGINT else TRY_AGAIN


def end_soon(code: int, seconds: float = EXIT_SECONDS) -> None:
    """Ends this process with exit code ``code`` after ``seconds``, unless it has ended by then: then what it started gets
    SIGTERM (seen on Linux only), and neither threads nor atexit functions are waited for."""

    def end() -> NoReturn:
        time.sleep(seconds)
        for child in _descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGTERM)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # closed, or a pipe without reader
                stream.flush()
        os._exit(code)

    threading.Thread(target=end, name="end_soon", daemon=True).start()


def _descendants(process: int) -> list[int]:
    """Those of ``process`` as /proc has them now; parents before their children."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            # "PID (any name) STATE PARENT ...", proc(5)
            parent = int(status.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    found = list(children.get(process, ()))
    for child in found:  # which grows
        found += children.get(child, ())
    return found


def install() -> None:
    """Take over the three signals (again: libraries put handlers of their own in their place)."""
    for signum in SIGNALS:
        signal.signal(signum, _receive)


def listening() -> bool:
    """Whether this program takes signals as requests: commands do, a notebook keeps its own handlers."""
    return _inbox.listening


@contextmanager
def listen() -> Iterator[None]:
    """Take over the signals for a while. Within another ``listen``, and in a thread that cannot have handlers, this
    does nothing."""
    if _inbox.listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    install()
    _inbox.listening = True
    try:
        yield
    finally:
        _inbox.listening = False
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _receive(signum: int, frame: FrameType | None) -> None:
    again = _inbox.pending is not None
    if not _inbox.deferred or (again and signum == signal.SIGINT):
        raise Interrupted(signum)
    if again:
        return
    _inbox.pending = signum
    hint = "; once more stops at once" if signum == signal.SIGINT else ""
    print(
        f"{signal.Signals(signum).name}: stopping after this step, with a checkpoint{hint}",
        file=sys.stderr,
        flush=True,
    )


def defer() -> None:
    """From now on note signals instead of raising; ``pending`` tells."""
    _inbox.deferred, _inbox.pending = True, None


def settle(*, raising: bool) -> None:
    """No longer defer. raising: raise Interrupted for a signal that was noted too late to be asked for."""
    _inbox.deferred = False
    noted, _inbox.pending = _inbox.pending, None
    if raising and noted is not None:
        raise Interrupted(noted)


def pending() -> int | None:
    """The signal that was noted, None without one."""
    return _inbox.pending
