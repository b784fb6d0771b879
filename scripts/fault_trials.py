"""A run that can be disturbed, and what it is held to: the ground that the faults of ``inject_faults.py`` stand on.

A fault (``faults_of_processes.py``, ``faults_of_files.py``) is a function of a Trial: it starts the run, does its harm,
waits for the end, and returns what was wrong about how it ended (None: as it should). ``Trial.finish`` then goes on
with the run and compares.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forked_run
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import qtrain.training.fit  # noqa: F401 (so that forked children find it imported)
from qtrain.cli import config_dir
from qtrain.commands.train import run_rank
from qtrain.training.callbacks.metrics_jsonl import METRICS, read_metrics
from qtrain.training.checkpoints import CheckpointError, checkpoints_in, load_checkpoint, verify
from qtrain.training.launcher import launch
from qtrain.training.run_folder import ATTEMPTS, read_lines

# The last validation is one of its own, after the last checkpoint: 5 does not divide 12
STEPS, EVERY, EVALUATED = 12, 3, 5
OVERRIDES = [
    "data=text", "data.val_fraction=0.2", "model=gpt_1m", "model.layers=1", "model.width=64", "model.heads=2",
    "model.dropout=0.1", "recipe=qpt", "w=int8_row_sr", "a=int8_row_sr", "g=int8_column_sr", "sequence_tokens=32",
    "batch_sequences=4", "micro_batch_sequences=2", "eval_windows=4", f"eval_every_steps={EVALUATED}",
    f"steps={STEPS}", f"checkpoint_every_steps={EVERY}", "schedule=cosine", "schedule.warmup_steps=2", "logger=none",
    "compile=false", "device=cpu", "sample.max_new_tokens=1", "resume=auto", "~callbacks.census",
]  # fmt: skip
WORDS = "the a cat dog bird sees hears small old river tree house and then"
SURVIVED, CORRUPTED = "survived", "silently corrupted"


def write_corpus(folder: Path) -> None:
    """60 documents of random words."""
    draw = random.Random(0)
    folder.mkdir(parents=True)
    for i in range(60):
        text = " ".join(draw.choice(WORDS.split()) for _ in range(80))
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


def overrides(corpus: Path, shards: Path, out: Path, *more: str) -> list[str]:
    """The words of the command line of a run."""
    return [
        *OVERRIDES,
        f"data.source.paths=[{corpus}]",
        f"data.folder={shards}",
        f"out={out}",
        "run=one",
        *more,
    ]


def every_byte(folder: Path) -> dict[str, bytes]:
    """What lies in a run's folder, but for the lock, which says who held it last."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name != ".lock"}  # fmt: skip


@dataclass
class Lab:
    """Where the trials happen. reference: an undisturbed run's folder, with all its checkpoints; foreign: that of
    another seed. seconds: what an undisturbed run takes. places: how often it made, renamed, synced or (in
    checkpoints) wrote a file."""

    root: Path
    seconds: float = 1.0
    places: int = 0
    reference: Path = Path()
    foreign: Path = Path()
    wanted: dict[str, Any] = field(default_factory=dict)

    def config(self, out: Path, *more: str, shards: Path | None = None) -> dict[str, Any]:
        words = overrides(self.root / "corpus", shards or self.root / "shards", out, *more)
        with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
            cfg = compose("train", words)
        found: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        return found

    def build(self) -> None:
        """The corpus, the reference and the foreign run."""
        write_corpus(self.root / "corpus")
        # The first prepares the data, which the others find
        for name, more in (("foreign", ["seed=5"]), ("reference", [])):
            config = self.config(self.root / name, "callbacks.checkpoint.keep=null", *more)
            places, begun = Places(), time.monotonic()
            code = forked_run.wait(forked_run.start(config, self.root / "log", places.install))
            if code != 0:
                raise RuntimeError(f"the {name} run ended with {code}:\n{(self.root / 'log').read_text()}")
            self.seconds, self.places = time.monotonic() - begun, places.passed
        self.reference, self.foreign = (self.root / n / "train" / "one" for n in ("reference", "foreign"))
        self.wanted = state_of(self.reference)

    def wanted_of(self, strategy: str) -> dict[str, Any]:
        """The state of an undisturbed run of two processes, trained when it is first asked for."""
        folder = self.root / strategy / "train" / "one"
        if not folder.is_dir():
            config = in_two(self.config(self.root / strategy), strategy)
            code = forked_run.wait(forked_run.start(config, self.root / "log", train=train_in_two))
            if code != 0:
                raise RuntimeError(
                    f"the {strategy} run ended with {code}:\n{(self.root / 'log').read_text()}"
                )
        return state_of(folder)


def in_two(config: dict[str, Any], strategy: str) -> dict[str, Any]:
    trainer = {**config["trainer"], "devices": 2, "strategy": strategy, "timeout_seconds": 60}
    return {**config, "trainer": trainer}


def train_in_two(config: dict[str, Any]) -> int:
    """As the command does, with less patience."""
    return launch(config, "qtrain.commands.train:run_rank", 2, grace_seconds=2.0)


class Places:
    """The places of a run at which it acts on a disk: files synced, renamed and removed, folders made; of the many
    blocks of a checkpoint every so many. act: called before the one of number ``at``, and all after it. The count is
    shared with forked children."""

    BLOCKS = 50

    def __init__(self, at: int | None = None, act: Callable[[], None] = lambda: None) -> None:
        import mmap

        self._count, self._at, self._act = mmap.mmap(-1, 8), at, act

    @property
    def passed(self) -> int:
        return int.from_bytes(self._count[:8], "little")

    def _pass(self) -> None:
        number = self.passed
        self._count[:8] = (number + 1).to_bytes(8, "little")
        if self._at is not None and number >= self._at:
            self._act()

    def install(self) -> None:
        """In the child."""
        from qtrain.training import checkpoints

        def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                self._pass()
                return function(*arguments, **named)

            return call

        for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink"):
            setattr(os, name, wrapped(getattr(os, name)))
        write, blocks = checkpoints._Hashed.write, [0]

        def write_block(file: Any, data: bytes) -> int:
            blocks[0] += 1
            try:
                if blocks[0] % self.BLOCKS == 1:
                    self._pass()
            except OSError as error:
                file.failure = error
                raise
            return write(file, data)

        checkpoints._Hashed.write = write_block  # type: ignore[method-assign]


@dataclass
class Trial:
    """One run that is disturbed. lost: steps that were done before the last fault and had to be computed again.
    codes: of the processes that were waited for. refused: a start, or a checkpoint, was refused by name."""

    lab: Lab
    draw: random.Random
    out: Path
    lost: int = 0
    codes: list[int] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.out.mkdir()
        shutil.copytree(self.lab.root / "shards", self.shards)
        self.log, self.train, self.wanted = self.out / "log", run_rank, self.lab.wanted
        self.move(self.out)

    def move(self, out: Path) -> None:
        """The run's folder lies below ``out``."""
        self.config = self.lab.config(out, shards=self.shards)
        self.folder = out / "train" / "one"

    @property
    def shards(self) -> Path:
        return self.out / "shards"

    @property
    def refused(self) -> bool:
        return any(line.startswith(("refused: ", "qtrain: ")) for line in self.said().splitlines())

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.is_file() else ""

    def in_two(self, strategy: str) -> None:
        """From now on the run is trained by two processes."""
        self.config, self.train = in_two(self.config, strategy), train_in_two
        if strategy == "fsdp2":
            self.wanted = self.lab.wanted_of(strategy)

    def start(self, prepare: Callable[[], None] = lambda: None) -> int:
        self.pids.append(forked_run.start(self.config, self.log, prepare, self.train))
        return self.pids[-1]

    def wait(self, pid: int) -> int:
        self.codes.append(forked_run.wait(pid))
        self.pids.remove(pid)
        return self.codes[-1]

    def kill(self, pid: int) -> int:
        os.kill(pid, signal.SIGKILL)
        return self.wait(pid)

    def end(self) -> None:
        """Nothing that was started is left."""
        for pid in list(self.pids):
            self.kill(pid)

    def moment(self, runs: float = 1.05) -> None:
        """Any time of a run, from its first instruction on. runs: the latest, in the time that a whole run takes."""
        time.sleep(self.draw.uniform(0.0, runs * self.lab.seconds))

    def until(self, pid: int, condition: Callable[[], bool]) -> None:
        """Until the condition holds, or the run has ended."""
        last = time.monotonic() + forked_run.PATIENCE_SECONDS
        while not condition() and alive(pid) and time.monotonic() < last:
            time.sleep(0.002)

    def after_rows(self, pid: int, least: int) -> None:
        self.until(pid, lambda: forked_run.rows(self.folder) >= least)

    def copy_of_reference(self, *, oldest: int = 2) -> Path:
        """The run's folder as if the machine had died some steps after a checkpoint, its ``oldest``-th or later;
        returns that checkpoint."""
        latest = self.draw.randrange(oldest * EVERY, STEPS, EVERY)
        self.folder.parent.mkdir(parents=True)
        shutil.copytree(self.lab.reference, self.folder)
        for path in checkpoints_in(self.folder / "checkpoints"):
            if int(path.name.removeprefix("step-")) > latest:
                shutil.rmtree(path)
        for name in ("verdict.json", "summary.json", "sample.txt", "loss.png"):
            (self.folder / name).unlink()
        ahead = latest + self.draw.randrange(EVERY)
        lines = (self.folder / METRICS).read_text().splitlines(keepends=True)
        (self.folder / METRICS).write_text("".join(r for r in lines if json.loads(r)["step"] <= ahead))
        return checkpoints_in(self.folder / "checkpoints")[0]

    def steps_done(self) -> int:
        path = self.folder / METRICS
        rows = read_metrics(path) if path.is_file() else []
        return max((row["step"] for row in rows if row["kind"] == "train"), default=0)

    def attempts(self) -> list[dict[str, Any]]:
        path = self.folder / ATTEMPTS
        return read_lines(path) if path.is_file() else []

    def expect(self, code: int, *allowed: int) -> str | None:
        """What is wrong where the exit code is none of ``allowed``."""
        return None if code in allowed else f"exit code {code}, not {allowed}\n{self.said()[-2000:]}"

    def refuses(self, *named: str) -> str | None:
        """Starts the run, which must be refused with a sentence that has ``named`` in it, and change nothing."""
        before = every_byte(self.folder)
        wrong = self.expect(self.wait(self.start()), 2)
        if wrong is None and every_byte(self.folder) != before:
            return "a refused start changed the run's folder"
        missing = [word for word in named if word not in self.said()]
        return wrong or (f"the refusal does not name {missing}:\n{self.said()[-2000:]}" if missing else None)

    def finish(self) -> str:
        """Starts the run again until it is complete: survived, silently corrupted or how it got stuck."""
        done, before = self.steps_done(), self.attempts()
        if self.wait(self.start()) != 0:
            return f"stuck: exit code {self.codes[-1]}\n{self.said()[-2000:]}"
        if "Traceback" in self.said():
            return f"a stack trace where a sentence belongs:\n{self.said()[-4000:]}"
        if self.attempts()[len(before) :]:  # none where the run was complete already
            self.lost = max(0, done - self.attempts()[-1]["step"])
        return self.compared()

    def compared(self) -> str:
        try:
            found = state_of(self.folder)
            for path in checkpoints_in(self.folder / "checkpoints"):
                verify(path)
        except CheckpointError as error:
            return f"complete, with a checkpoint that is not whole: {error}"
        left = [str(p) for p in self.folder.rglob(".*.partial")]
        if left:
            return f"complete, and {', '.join(left)} was left"
        return SURVIVED if same(found, self.wanted) else CORRUPTED


def alive(pid: int) -> bool:
    """Whether a child has not ended; it is left to be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


Fault = Callable[[Trial], str | None]  # what was wrong already, None where nothing was
FAULTS: dict[str, Fault] = {}
# kind -> how often at most: real processes import torch anew, which takes some ten seconds each
RARE: dict[str, int] = {}


def fault(name: str, *, rare: int | None = None) -> Callable[[Fault], Fault]:
    def register(inject: Fault) -> Fault:
        FAULTS[name] = inject
        if rare is not None:
            RARE[name] = rare
        return inject

    return register
