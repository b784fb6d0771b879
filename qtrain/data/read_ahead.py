"""A thread that reads ahead of who consumes, begins again where the network failed, and passes errors on.

    chunks(state) -> (state before it, tokens), (state before it, tokens), ...

Tokenizers and networks leave Python's lock most of the time, so that a thread is enough, and what it reads needs no
copy into another process.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Chunk = tuple[dict[str, Any], NDArray[np.int32]]
Chunks = Callable[[Mapping[str, Any]], Iterator[Chunk]]
# How often a producer that waits for room looks whether it should end, seconds
_LOOK = 0.2


class StreamError(RuntimeError):
    """A stream cannot be read on: it is out of reach, came to its end, or is another one."""


class ReadAhead:
    """``next`` gives the chunks from ``state`` on; at most about ``ahead_tokens`` are read before they are asked for.
    backoff: seconds to wait before each new attempt after an error of the system or network; attempts count anew after
    each chunk."""

    def __init__(
        self, chunks: Chunks, state: Mapping[str, Any], ahead_tokens: int, backoff: Sequence[float]
    ) -> None:
        self._queue: queue.Queue[Any] = queue.Queue()
        self._room, self._stop = _Room(ahead_tokens), threading.Event()
        self._failure: BaseException | None = None
        arguments = (chunks, state, backoff, self._queue, self._room, self._stop)
        self._thread = threading.Thread(target=_produce, args=arguments, name="read-ahead", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._stop.set)

    def __next__(self) -> Chunk:
        """Raises what the reading raised, again at each call."""
        if self._failure is not None:
            raise self._failure
        found = self._queue.get()
        if isinstance(found, BaseException):
            self._failure = found
            raise found
        self._room.give_back(len(found[1]))
        return found

    def close(self) -> None:
        """Ends the thread, at the latest when its present read is over."""
        self._stop.set()


class _Room:
    """Tokens that may be read before they are asked for; one chunk may exceed them."""

    def __init__(self, tokens: int) -> None:
        self._limit, self._held = tokens, 0
        self._changed = threading.Condition()

    def take(self, tokens: int, stop: threading.Event) -> bool:
        """Waits for room; False where the reading should end."""
        with self._changed:
            while self._held >= self._limit and not stop.is_set():
                self._changed.wait(_LOOK)
            self._held += tokens
        return not stop.is_set()

    def give_back(self, tokens: int) -> None:
        with self._changed:
            self._held -= tokens
            self._changed.notify()


def _produce(
    chunks: Chunks,
    state: Mapping[str, Any],
    backoff: Sequence[float],
    out: queue.Queue[Any],
    room: _Room,
    stop: threading.Event,
) -> None:
    failures, last = 0, None
    while not stop.is_set():
        try:
            found = chunks(state if last is None else last)
            if last is not None:
                next(found)  # handed over before the failure
            for before, tokens in found:
                if not room.take(len(tokens), stop):
                    return
                out.put((before, tokens))
                last, failures = before, 0
            raise RuntimeError("the stream ended without saying why")
        except BaseException as error:
            if not of_networks(error):
                out.put(error)
                return
            if failures == len(backoff):
                out.put(
                    StreamError(
                        f"the data could not be read on, {failures + 1} attempts in a row: {error}; when they can be "
                        "reached again, the run goes on from its last checkpoint with resume=auto"
                    )
                )
                return
            stop.wait(backoff[failures])
            failures += 1


# Those whose errors are no OSErrors
_NETWORK_LIBRARIES = frozenset(
    {
        "aiobotocore",
        "aiohttp",
        "botocore",
        "fsspec",
        "gcsfs",
        "httpcore",
        "httpx",
        "huggingface_hub",
        "requests",
        "urllib3",
    }
)


def of_networks(error: BaseException) -> bool:
    """Whether to try again may help."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _NETWORK_LIBRARIES
