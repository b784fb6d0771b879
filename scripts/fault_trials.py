"""The faults of ``inject_faults.py``: a run that can be disturbed, and every way of disturbing it.

A fault is a function of a Trial: it starts the run, does its harm, waits for the end, and returns what was wrong about
how it ended (None: as it should). ``Trial.finish`` then goes on with the run and compares.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forked_run
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qtrain.cli import config_dir
from qtrain.training.callbacks.metrics_jsonl import METRICS, read_metrics
from qtrain.training.checkpoints import MANIFEST, TRAINING, WEIGHTS, checkpoints_in, load_checkpoint
from qtrain.training.run_folder import ATTEMPTS, read_lines

STEPS, EVERY = 12, 3
OVERRIDES = [
    "data=text", "data.val_fraction=0.2", "model=gpt_1m", "model.layers=1", "model.width=64", "model.heads=2",
    "+model.dropout=0.1", "recipe=qpt", "w=int8_row_sr", "a=int8_row_sr", "g=int8_column_sr", "sequence_tokens=32",
    "batch_sequences=4", "micro_batch_sequences=2", "eval_windows=4", "eval_every_steps=4", f"steps={STEPS}",
    f"checkpoint_every_steps={EVERY}", "schedule=cosine", "schedule.warmup_steps=2", "logger=none", "compile=false",
    "device=cpu", "sample.max_new_tokens=1", "resume=auto", "~callbacks.census",
]  # fmt: skip


def write_corpus(folder: Path) -> None:
    """60 documents of random words."""
    draw, words = (
        random.Random(0),
        [
            "the",
            "a",
            "cat",
            "dog",
            "bird",
            "sees",
            "hears",
            "small",
            "old",
            "river",
            "tree",
            "house",
            "and",
            "then",
        ],
    )
    folder.mkdir(parents=True)
    for i in range(60):
        text = " ".join(draw.choice(words) for _ in range(80))
        (folder / f"{i:03d}.txt").write_text(f"{text}.\n", encoding="utf-8")


def state_of(folder: Path) -> dict[str, Any]:
    """All that must be equal: the last checkpoint's tensors, and the curve without its times."""
    saved = load_checkpoint(checkpoints_in(folder / "checkpoints")[0])
    found: dict[str, Any] = {f"weights/{k}": t for k, t in saved["state_dict"].items()}
    for i, held in saved["optimizer_states"][0]["state"].items():
        found |= {f"states/{i}/{k}": t for k, t in held.items()}
    rows = read_metrics(folder / METRICS)
    timed = ("seconds", "tokens_per_s")
    return {**found, "curve": [{k: v for k, v in r.items() if k not in timed} for r in rows]}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        return bool(x.dtype == y.dtype and torch.equal(x, y)) if isinstance(x, torch.Tensor) else bool(x == y)

    return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)


@dataclass
class Lab:
    """Where the trials happen. reference: an undisturbed run's folder, with all its checkpoints; foreign: that of
    another seed. seconds: what an undisturbed run takes."""

    root: Path
    seconds: float = 1.0
    reference: Path = Path()
    foreign: Path = Path()
    wanted: dict[str, Any] = field(default_factory=dict)

    def config(self, out: Path, *more: str) -> dict[str, Any]:
        base = [
            *OVERRIDES,
            f"data.source.paths=[{self.root / 'corpus'}]",
            f"data.folder={self.root / 'shards'}",
        ]
        with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
            cfg = compose("train", [*base, f"out={out}", *more])
        found: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        return found

    def build(self) -> None:
        """The corpus, the reference and the foreign run."""
        write_corpus(self.root / "corpus")
        for name, more in (("reference", []), ("foreign", ["seed=5"])):
            config = self.config(self.root / name, "run=one", "callbacks.checkpoint.keep=null", *more)
            begun = time.monotonic()
            code = forked_run.wait(forked_run.start(config, self.root / "log"))
            if code != 0:
                raise RuntimeError(f"the {name} run ended with {code}:\n{(self.root / 'log').read_text()}")
            self.seconds = time.monotonic() - begun
        self.reference, self.foreign = (self.root / n / "train" / "one" for n in ("reference", "foreign"))
        self.wanted = state_of(self.reference)


@dataclass
class Trial:
    """One run that is disturbed. lost: steps that were done before the last fault and had to be computed again."""

    lab: Lab
    draw: random.Random
    out: Path
    lost: int = 0
    codes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.out.mkdir()
        shutil.copytree(self.lab.root / "shards", self.shards)
        self.config = self.lab.config(self.out, "run=one", f"data.folder={self.shards}")
        self.folder, self.log = self.out / "train" / "one", self.out / "log"

    @property
    def shards(self) -> Path:
        return self.out / "shards"

    @property
    def shard(self) -> Path:
        return next(self.shards.glob("*/train-00000.bin"))

    def start(self, prepare: Callable[[], None] = lambda: None) -> int:
        return forked_run.start(self.config, self.log, prepare)

    def wait(self, pid: int) -> int:
        self.codes.append(forked_run.wait(pid))
        return self.codes[-1]

    def moment(self) -> None:
        """Any time of a run, from its first instruction on."""
        time.sleep(self.draw.uniform(0.0, 1.1 * self.lab.seconds))

    def after_steps(self, pid: int, least: int) -> None:
        """Until so many rows are written, or the run has ended."""
        until = time.monotonic() + 60
        while forked_run.rows(self.folder) < least and alive(pid) and time.monotonic() < until:
            time.sleep(0.003)

    def copy_of_reference(self) -> Path:
        """The run's folder as if the machine had died some steps after a checkpoint, its second or later; returns that
        checkpoint."""
        latest = self.draw.randrange(2 * EVERY, STEPS, EVERY)
        self.folder.parent.mkdir()
        shutil.copytree(self.lab.reference, self.folder)
        for path in checkpoints_in(self.folder / "checkpoints"):
            if int(path.name.removeprefix("step-")) > latest:
                shutil.rmtree(path)
        (self.folder / "verdict.json").unlink()
        ahead = latest + self.draw.randrange(EVERY)
        rows = [
            r
            for r in (self.folder / METRICS).read_text().splitlines(keepends=True)
            if json.loads(r)["step"] <= ahead
        ]
        (self.folder / METRICS).write_text("".join(rows))
        return checkpoints_in(self.folder / "checkpoints")[0]

    def steps_done(self) -> int:
        path = self.folder / METRICS
        return (
            max((r["step"] for r in read_metrics(path) if r["kind"] == "train"), default=0)
            if path.is_file()
            else 0
        )

    def attempts(self) -> list[dict[str, Any]]:
        path = self.folder / ATTEMPTS
        return read_lines(path) if path.is_file() else []

    def finish(self) -> str:
        """Starts the run again until it is complete: ``survived``, ``silently corrupted`` or how it got stuck."""
        done, before = self.steps_done(), self.attempts()
        if self.wait(self.start()) != 0:
            return f"stuck: exit code {self.codes[-1]}\n{self.log.read_text()[-2000:]}"
        if self.attempts()[len(before) :]:  # none where the run was complete already
            self.lost = max(0, done - self.attempts()[-1]["step"])
        return "survived" if same(state_of(self.folder), self.lab.wanted) else "silently corrupted"


def alive(pid: int) -> bool:
    """Whether a child has not ended; it is left to be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


Fault = Callable[[Trial], str | None]  # what was wrong already, None where nothing was
FAULTS: dict[str, Fault] = {}


def fault(name: str) -> Callable[[Fault], Fault]:
    def register(inject: Fault) -> Fault:
        FAULTS[name] = inject
        return inject

    return register


def expect(trial: Trial, code: int, *allowed: int) -> str | None:
    return None if code in allowed else f"exit code {code}, not {allowed}\n{trial.log.read_text()[-2000:]}"


@fault("kill -9 at any moment")
def _(t: Trial) -> str | None:
    pid = t.start()
    t.moment()
    os.kill(pid, signal.SIGKILL)
    return expect(t, t.wait(pid), -9, 0)


@fault("kill -9 while a checkpoint is written")
def _(t: Trial) -> str | None:
    pid, place, skip = t.start(), t.folder / "checkpoints", t.draw.randrange(4)
    seen: set[str] = set()
    while alive(pid) and len(seen) <= skip:
        seen |= {p.name for p in place.glob(".step-*.partial")}
    time.sleep(t.draw.uniform(0, 0.004))
    os.kill(pid, signal.SIGKILL)
    return expect(t, t.wait(pid), -9, 0)


@fault("kill -9 of a run that had resumed")
def _(t: Trial) -> str | None:
    t.copy_of_reference()
    pid = t.start()
    t.moment()
    os.kill(pid, signal.SIGKILL)
    return expect(t, t.wait(pid), -9, 0)


def _signalled(signum: int, code: int) -> Fault:
    def inject(t: Trial) -> str | None:
        pid = t.start()
        t.moment()
        os.kill(pid, signum)
        # Before the handlers are there the signal's default ends the process
        return expect(t, t.wait(pid), code, 0, -signum)

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
    return expect(t, t.wait(pid), 130, 0, -signal.SIGINT)


@fault("disk full: no file grows beyond a limit")
def _(t: Trial) -> str | None:
    limit = t.draw.randrange(2_000, 700_000)

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return expect(t, t.wait(t.start(prepare)), 3, 0, 1)


@fault("disk full: ENOSPC at any write of a checkpoint")
def _(t: Trial) -> str | None:
    left = [t.draw.randrange(120)]

    def prepare() -> None:
        from qtrain.training import checkpoints

        write = checkpoints._Hashed.write

        def maybe(self: Any, data: bytes) -> int:
            left[0] -= 1
            if left[0] < 0:
                self.failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                raise self.failure
            return write(self, data)

        checkpoints._Hashed.write = maybe  # type: ignore[method-assign]

    return expect(t, t.wait(t.start(prepare)), 3, 0)


def _damaged(damage: Callable[[Trial, Path], None]) -> Fault:
    def inject(t: Trial) -> None:
        damage(t, t.copy_of_reference())

    return inject


def _any_file(t: Trial, checkpoint: Path) -> Path:
    return checkpoint / t.draw.choice([WEIGHTS, TRAINING, MANIFEST])


def _cut(t: Trial, checkpoint: Path) -> None:
    path = checkpoint / t.draw.choice([WEIGHTS, TRAINING])
    os.truncate(path, t.draw.randrange(path.stat().st_size))


def _flip(t: Trial, checkpoint: Path) -> None:
    path = _any_file(t, checkpoint)
    data = bytearray(path.read_bytes())
    data[t.draw.randrange(len(data))] ^= 1 << t.draw.randrange(8)
    path.write_bytes(data)


def _swap(t: Trial, checkpoint: Path) -> None:
    other = t.draw.choice(
        [p for p in checkpoints_in(t.lab.reference / "checkpoints") if p.name != checkpoint.name]
    )
    name = t.draw.choice([WEIGHTS, TRAINING])
    shutil.copy(other / name, checkpoint / name)


def _foreign(t: Trial, checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(t.lab.foreign / "checkpoints" / checkpoint.name, checkpoint)


def _leftovers(t: Trial, checkpoint: Path) -> None:
    partial = checkpoint.with_name(f".step-{STEPS:06d}.partial")
    partial.mkdir()
    (partial / WEIGHTS).write_bytes(t.draw.randbytes(1000))
    for name in (METRICS, ATTEMPTS):
        with (t.folder / name).open("ab") as file:
            file.write(b'{"kind": "train", "step": 1'[: t.draw.randrange(1, 27)])


for _name, _damage in {
    "newest checkpoint: a file cut": _cut,
    "newest checkpoint: a bit flipped": _flip,
    "newest checkpoint: a file deleted": lambda t, c: _any_file(t, c).unlink(),
    "newest checkpoint: a file emptied": lambda t, c: _any_file(t, c).write_bytes(b""),
    "newest checkpoint: a file of another step": _swap,
    "newest checkpoint: one of another run": _foreign,
    "half-written lines and folders": _leftovers,
}.items():
    FAULTS[_name] = _damaged(_damage)


@fault("all checkpoints damaged")
def _(t: Trial) -> str | None:
    t.copy_of_reference()
    hurt = {p: p.with_name(f"whole-{p.name}") for p in checkpoints_in(t.folder / "checkpoints")}
    for path, whole in hurt.items():
        shutil.copytree(path, whole)
        _flip(t, path)
    before = (t.folder / METRICS).read_bytes()
    wrong = expect(t, t.wait(t.start()), 2)  # refused by name, nothing touched
    if wrong is None and (t.folder / METRICS).read_bytes() != before:
        wrong = "a refused start changed the run"
    for path, whole in hurt.items():
        shutil.rmtree(path)
        whole.rename(path)
    return wrong


@fault("a file where the checkpoints' folder should be")
def _(t: Trial) -> str | None:
    t.folder.mkdir(parents=True)
    (t.folder / "checkpoints").touch()
    wrong = expect(t, t.wait(t.start()), 3)
    (t.folder / "checkpoints").unlink()
    return wrong


def _shard_while_training(damage: Callable[[Trial], None], *codes: int) -> Fault:
    def inject(t: Trial) -> str | None:
        good = t.shard.read_bytes()
        pid = t.start()
        t.after_steps(pid, t.draw.randrange(1, STEPS - 1))
        damage(t)
        wrong = expect(t, t.wait(pid), *codes)
        t.shard.write_bytes(good)
        return wrong

    return inject


def _alter(t: Trial) -> None:
    with t.shard.open("r+b") as file:
        file.seek(t.draw.randrange(t.shard.stat().st_size - 40))
        file.write(b"\x07\x00" * 20)


FAULTS["a shard cut while it is read"] = _shard_while_training(lambda t: os.truncate(t.shard, 100), 3)
FAULTS["a shard altered while it is read"] = _shard_while_training(_alter, 3)
FAULTS["a shard touched while it is read"] = _shard_while_training(lambda t: os.utime(t.shard, (0, 4e9)), 0)


@fault("a shard altered between two starts")
def _(t: Trial) -> str | None:
    t.copy_of_reference()
    good = t.shard.read_bytes()
    _alter(t)
    wrong = expect(t, t.wait(t.start()), 2)
    t.shard.write_bytes(good)
    return wrong


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

    return expect(t, t.wait(t.start(prepare)), 3)


@fault("a clock that jumps by years, and kill -9")
def _(t: Trial) -> str | None:
    def prepare() -> None:
        now, looks = time.time, [0]

        def jumping() -> float:
            looks[0] += 1
            return now() + (-1) ** looks[0] * 1e8

        time.time = jumping

    pid = t.start(prepare)
    t.moment()
    os.kill(pid, signal.SIGKILL)
    wrong = expect(t, t.wait(pid), -9, 0)
    for path in checkpoints_in(t.folder / "checkpoints"):
        os.utime(path, (t.draw.uniform(0, 4e9),) * 2)
    return wrong


@fault("the same run started twice")
def _(t: Trial) -> str | None:
    first = t.start()
    t.after_steps(first, 1)
    wrong = expect(t, t.wait(t.start()), 2)
    return wrong or expect(t, t.wait(first), 0)


@fault("kill -9 of one of two processes (DDP)")
def _(t: Trial) -> str | None:
    """The other process is stopped by the launcher; the run then goes on in one process. One micro-batch of each
    process makes a step, so that both sum the same two numbers."""
    from qtrain.training.launcher import launch

    config = {
        **t.config,
        "trainer": {**t.config["trainer"], "devices": 2, "strategy": "ddp", "timeout_seconds": 60},
    }
    pid = forked_run.start(
        config, t.log, train=lambda c: launch(c, "qtrain.commands.train:run_rank", 2, grace_seconds=2.0)
    )
    t.after_steps(pid, t.draw.randrange(1, STEPS - 2))
    ranks = subprocess.run(
        ["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False
    ).stdout.split()
    os.kill(int(t.draw.choice(ranks)), signal.SIGKILL)
    return expect(t, t.wait(pid), 137)


# Real processes import torch anew, which takes some ten seconds each: few of these
RARE = {"kill -9 of one of two processes (DDP)": 4}
