"""Ranks that a program of the tests forks, so that torch is imported once for all of them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable


def fork_ranks(world: int, work: Callable[..., None], *arguments: object) -> None:
    """``work(*arguments, rank)`` in ``world`` processes at once, until all have ended. Raises RuntimeError where one failed."""
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=work, args=(*arguments, rank)) for rank in range(world)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError(f"{arguments}: exit codes {[worker.exitcode for worker in workers]}")
