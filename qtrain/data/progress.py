"""How far a preparation is: a bar with the time left on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

# (stage, documents done, documents in all or None where that is not known yet)
Progress = Callable[[str, int, int | None], None]
# Between two lines of a log: a job of hours leaves some hundreds
LINE_SECONDS = 15.0


def no_progress(stage: str, done: int, total: int | None) -> None:
    pass


@contextmanager
def shown_progress(stream: IO[str] | None = None) -> Iterator[Progress]:
    """``with shown_progress() as progress: prepare(..., progress=progress)``. stream: default standard error."""
    stream = stream or sys.stderr
    if stream.isatty():
        with _bars(stream) as progress:
            yield progress
    else:
        yield Lines(stream)


@contextmanager
def _bars(stream: IO[str]) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    left = TextColumn("left"), TimeRemainingColumn()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), *left
    with Bar(*columns, console=Console(file=stream)) as bar:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield update


class Lines:
    """A line every LINE_SECONDS while a stage goes on, and one at its end where it took as long."""

    def __init__(self, stream: IO[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._stage, self._begun, self._next = "", 0.0, 0.0

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now = self._clock()
        if stage != self._stage:
            self._stage, self._begun, self._next = stage, now, now + LINE_SECONDS
        if now < self._next:
            return
        self._next = now + LINE_SECONDS
        elapsed = now - self._begun
        text = f"{stage}: {done:,} documents"
        if total is not None:
            text += f" of {total:,}"
        if total is not None and done:
            text += f", {elapsed * (total - done) / done:,.0f} s left"
        print(f"{text} after {elapsed:,.0f} s", file=self._stream, flush=True)
