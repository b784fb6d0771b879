"""Signals that ask a run to stop, from its first moment on.

    SIGTERM, SIGUSR1   the machine will be taken away: save, and stop
    SIGINT (Ctrl-C)    the same; a second one stops at once

Batch systems send them early, and an unhandled one kills: the handlers are installed before anything slow is imported.
While a run trains a signal is noted (``defer``) and asked for when a step is whole (``pending``); at any other time
there is nothing to save, and it raises ``Interrupted`` where it arrives.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
# sysexits.h EX_TEMPFAIL: what batch scripts read as "try again"
TRY_AGAIN = 75


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
