"""Faults of processes: kills, signals, clocks, numbers that are not finite, a second process in the same run."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import Any

import forked_run
from fault_trials import EVERY, FAULTS, STEPS, Fault, Places, Trial, alive, fault

from qtrain.commands.train import run_rank
from qtrain.training.checkpoints import checkpoints_in


@fault("kill -9 at any moment")
def _(t: Trial) -> str | None:
    pid = t.start()
    t.moment()
    return t.expect(t.kill(pid), -9, 0)


@fault("kill -9 while a checkpoint is written")
def _(t: Trial) -> str | None:
    """Seen by its unfinished folder; none may be complete that was not before."""
    pid, place, skip = t.start(), t.folder / "checkpoints", t.draw.randrange(STEPS // EVERY)
    seen: set[str] = set()
    while alive(pid) and len(seen) <= skip:
        seen |= {p.name for p in place.glob(".step-*.partial")}
    time.sleep(t.draw.uniform(0, 0.004))
    return t.expect(t.kill(pid), -9, 0)


@fault("kill -9 before any sync, rename, removal or write")
def _(t: Trial) -> str | None:
    """By the run itself, so that every such place of the program is met exactly."""
    places = Places(t.draw.randrange(t.lab.places), lambda: os.kill(os.getpid(), signal.SIGKILL))
    return t.expect(t.wait(t.start(places.install)), -9)


@fault("kill -9 of a run that had resumed")
def _(t: Trial) -> str | None:
    t.copy_of_reference(oldest=1)
    pid = t.start()
    t.moment(0.7)
    return t.expect(t.kill(pid), -9, 0)


@fault("kill -9 five times in a row")
def _(t: Trial) -> str | None:
    """Early in each start, so that starting itself is what is cut off."""
    wrong = None
    for _ in range(5):
        pid = t.start()
        time.sleep(t.draw.uniform(0, 0.5 * t.lab.seconds))
        wrong = wrong or t.expect(t.kill(pid), -9, 0)
    return wrong


def _signalled(signum: int, code: int) -> Fault:
    def inject(t: Trial) -> str | None:
        pid = t.start()
        t.moment()
        os.kill(pid, signum)
        return t.expect(t.wait(pid), code, 0)

    return inject


FAULTS["SIGTERM"] = _signalled(signal.SIGTERM, 75)
FAULTS["SIGUSR1"] = _signalled(signal.SIGUSR1, 75)
FAULTS["Ctrl-C"] = _signalled(signal.SIGINT, 130)


@fault("Ctrl-C twice")
def _(t: Trial) -> str | None:
    pid = t.start()
    t.moment()
    for _ in range(2):
        if alive(pid):
            os.kill(pid, signal.SIGINT)
            time.sleep(t.draw.uniform(0, 0.01))
    return t.expect(t.wait(pid), 130, 0)


@fault("a batch of NaN")
def _(t: Trial) -> str | None:
    bad = t.draw.randrange(STEPS)

    def prepare() -> None:
        from qtrain.training.module import QuantizedTransformer

        losses = QuantizedTransformer.token_losses

        def poisoned(self: Any, batch: Any) -> Any:
            found = losses(self, batch)
            return found * float("nan") if self.training and self.trainer.global_step == bad else found

        QuantizedTransformer.token_losses = poisoned  # type: ignore[method-assign]

    return t.expect(t.wait(t.start(prepare)), 3)


@fault("a clock that jumps by years, and kill -9")
def _(t: Trial) -> str | None:
    def prepare() -> None:
        now, looks = time.time, [0]

        def jumping() -> float:
            looks[0] += 1
            return now() + (-1) ** looks[0] * 1e8

        time.time = jumping
        time.time_ns = lambda: int(jumping() * 1e9)

    pid = t.start(prepare)
    t.moment()
    wrong = t.expect(t.kill(pid), -9, 0)
    for path in checkpoints_in(t.folder / "checkpoints"):
        os.utime(path, (t.draw.uniform(0, 4e9),) * 2)
    return wrong


@fault("the same run started twice")
def _(t: Trial) -> str | None:
    first = t.start()
    t.after_rows(first, t.draw.randrange(1, STEPS - 3))
    wrong = t.expect(t.wait(t.start()), 2)
    return wrong or t.expect(t.wait(first), 0)


@fault("the same run started twice at once")
def _(t: Trial) -> str | None:
    """One of the two trains it, whichever was first; the other is refused (or finds it complete)."""
    pids = [t.start()]
    time.sleep(t.draw.uniform(0, 0.3 * t.lab.seconds) if t.draw.random() < 0.7 else 0)
    pids.append(t.start())
    codes = sorted(t.wait(pid) for pid in pids)
    return None if codes in ([0, 2], [0, 0]) else f"exit codes {codes}\n{t.said()[-3000:]}"


def _in_two(strategy: str, victim: str) -> Fault:
    """victim: ``rank``, which the launcher survives and names, or ``parent``, whose children the kernel ends.

    Under DDP the run goes on in one process, and is the same: of two micro-batches a step, both ways sum the same
    two numbers. Under FSDP2 the norm of the gradient is summed over the shards, so that it goes on in two.
    """

    def inject(t: Trial) -> str | None:
        alone = t.config
        t.in_two(strategy)
        parent = t.start()
        t.after_rows(parent, t.draw.randrange(1, STEPS - 2))
        ranks = _children(parent)
        if len(ranks) != 2:
            return f"{len(ranks)} processes\n{t.said()[-2000:]}"
        if victim == "rank":
            os.kill(t.draw.choice(ranks), signal.SIGKILL)
            wrong = t.expect(t.wait(parent), 128 + signal.SIGKILL)
        else:
            wrong = t.expect(t.kill(parent), -9)
            last = time.monotonic() + forked_run.PATIENCE_SECONDS
            while (left := [r for r in ranks if _runs(r)]) and time.monotonic() < last:
                time.sleep(0.01)
            wrong = wrong or (f"processes {left} outlived their parent" if left else None)
        if strategy == "ddp":
            t.config, t.train = alone, run_rank
        return wrong

    return inject


def _children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def _runs(pid: int) -> bool:
    """Whether a process, not a child of this one, is there and no zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


for _strategy in ("ddp", "fsdp2"):
    for _victim, _called in (("rank", "one of two processes"), ("parent", "the parent of two processes")):
        fault(f"kill -9 of {_called} ({_strategy.upper()})", rare=3)(_in_two(_strategy, _victim))
