"""One function over many items in several processes: results in the order of the items, few of them in memory.

Processes are spawned, not forked: a fork of a program with threads (torch, CUDA, a tokenizer's) may hang. They ignore
Ctrl-C, which their parent gets too and acts on, and end when it ends, however it does.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")
# Items a worker has in hand or waiting: with two it never waits for the parent, and memory stays bounded
_AHEAD = 2


class WorkerDied(RuntimeError):
    """A worker process was killed or could not start."""


def usable_cores() -> int:
    """Of this process: what a batch system or ``taskset`` gave it, not all of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_function: Callable[[Any], Any]


def _start(function: Callable[[Any], Any]) -> None:
    """In a new worker."""
    global _function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The processes are the parallelism: threads of the tokenizers library would fight over the same cores
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _function = function


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(item: Any) -> Any:
    return _function(item)


def map_in_order(function: Callable[[T], R], items: Iterable[T], workers: int) -> Generator[R, None, None]:
    """``map(function, items)`` in ``workers`` processes; in this one where ``workers`` is 1. function: picklable.

    Raises what ``function`` or ``items`` raise, and WorkerDied where a worker was killed; no process is left then.
    """
    if workers == 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(function,),
    )
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_call, item))
            if len(waiting) > _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise WorkerDied(
            "a worker process was killed (by hand, or by the system for its memory) or could not start; with fewer "
            "num_workers less memory is needed"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
