"""Waiting for the jobs of a submitted sweep: a line for each change, and their exit statuses in the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from qtrain import interrupts
from qtrain.cluster.queue import JobState, Queue, ask_slurm
from qtrain.cluster.sweep_file import Arm

# Looks in a row at which a SLURM that answers knows nothing of a job before it counts as lost
_LOOKS = 3


def exit_status(state: JobState) -> int:
    """Of an arm whose job has ended: the run's own, 130 where somebody cancelled it, 128 + n where signal n ended it, and 1
    where SLURM did (TIMEOUT, NODE_FAIL, ...)."""
    if state.state == "COMPLETED":
        return 0
    if state.state == "CANCELLED":
        return 130
    words = (state.exit_code or "").split()
    if len(words) == 2:
        return 128 + int(words[1])
    return int(words[0]) if words and words[0] != "0" else 1


class Watch:
    """What is known of the arms so far. ``codes``: the exit status of each that has ended, by its job's name."""

    def __init__(self, arms: Sequence[Arm]) -> None:
        self.arms, self.codes = arms, dict[str, int]()
        self._states, self._unknown, self._notes = dict[str, str](), dict[str, int](), set[str]()
        # What all arms have in common needs no mention
        self._common = set.intersection(*(set(arm.overrides) for arm in arms)) if len(arms) > 1 else set()

    @property
    def left(self) -> list[str]:
        return [arm.job for arm in self.arms if arm.job not in self.codes]

    def look(self, queue: Queue) -> None:
        """Takes in what SLURM says, and prints what is new."""
        for note in queue.notes:
            if note not in self._notes:
                print(f"qtrain: {note}", file=sys.stderr, flush=True)
        self._notes |= set(queue.notes)
        for arm in self.arms:
            if arm.job in self.codes:
                continue
            state = queue.jobs.get(arm.job)
            if state is None:
                self._miss(arm, queue.asked)
                continue
            self._unknown.pop(arm.job, None)
            if self._states.get(arm.job) != state.state:
                print(self._line(arm, state), flush=True)
            self._states[arm.job] = state.state
            if state.ended:
                self.codes[arm.job] = exit_status(state)

    def _miss(self, arm: Arm, asked: bool) -> None:
        self._unknown[arm.job] = self._unknown.get(arm.job, 0) + asked
        if self._unknown[arm.job] >= _LOOKS:
            print(
                f"{arm.job} is unknown to SLURM; how it ended stands in {arm.log}",
                file=sys.stderr,
                flush=True,
            )
            self.codes[arm.job] = 1

    def _line(self, arm: Arm, state: JobState) -> str:
        code = f", exit code {state.exit_code}" if state.exit_code and state.state == "FAILED" else ""
        reason = f" ({state.reason})" if state.waiting and state.reason else ""
        log = f"; {arm.log}" if state.ended and state.state != "COMPLETED" else ""
        words = [word for word in arm.overrides if word not in self._common and not word.startswith("run=")]
        return f"{time.strftime('%H:%M:%S')} {arm.job} {state.state}{code}{reason}  {' '.join(words)}{log}"


def wait_for(arms: Sequence[Arm], poll_seconds: float) -> list[int]:
    """Waits until all arms have ended. Returns their exit statuses. A signal ends the waiting and leaves the jobs."""
    watch = Watch(arms)
    try:
        while True:
            watch.look(ask_slurm(watch.left))
            if not watch.left:
                return [watch.codes[arm.job] for arm in arms]
            time.sleep(poll_seconds)
    except interrupts.Interrupted:
        array = arms[0].job.partition("_")[0]
        print(
            f"no longer waiting; the jobs go on: qtrain status shows them, scancel {array} ends them",
            file=sys.stderr,
        )
        raise
