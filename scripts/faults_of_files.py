"""Faults of files: full disks, damaged checkpoints, half-written lines, altered token shards."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from fault_trials import EVALUATED, EVERY, FAULTS, STEPS, SURVIVED, Fault, Places, Trial, fault

from qtrain.training.callbacks.metrics_jsonl import METRICS
from qtrain.training.checkpoints import MANIFEST, TRAINING, WEIGHTS, checkpoints_in
from qtrain.training.run_folder import ATTEMPTS

TMPFS = "disk full: a real file system of a few hundred kB"


@fault("disk full: no file grows beyond a limit")
def _(t: Trial) -> str | None:
    """RLIMIT_FSIZE, which the kernel enforces; the output goes to a pipe, since a log is a file too."""
    limit = int(10 ** t.draw.uniform(1.5, 5.9))
    reader, writer = os.pipe()

    def prepare() -> None:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    pid = t.start(prepare)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe, t.log.open("ab") as log:
        log.write(pipe.read())
    return t.expect(t.wait(pid), 2, 3, 0)


def _no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@fault("disk full: ENOSPC at any sync, rename or write, and ever after")
def _(t: Trial) -> str | None:
    places = Places(t.draw.randrange(t.lab.places), _no_space)
    return t.expect(t.wait(t.start(places.install)), 2, 3)


def can_mount() -> bool:
    """Whether this user may mount a file system of its own."""
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True).returncode:
            return False
        return subprocess.run(["umount", folder], capture_output=True).returncode == 0


@fault(TMPFS)
def _(t: Trial) -> str | None:
    disk, kilobytes = t.out / "disk", t.draw.randrange(8, 1800)
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(disk)]
    subprocess.run(mount, check=True)
    try:
        t.move(disk)
        wrong = t.expect(t.wait(t.start()), 2, 3, 0)
        t.move(t.out)
        if (disk / "train").is_dir():  # to a disk with room
            shutil.copytree(disk / "train", t.out / "train")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return wrong


def _damaged(damage: Callable[[Trial, Path], None]) -> Fault:
    """Of a run with two or more checkpoints: the one before is taken, and the newest is named."""

    def inject(t: Trial) -> None:
        damage(t, t.copy_of_reference())

    return inject


def _any_file(t: Trial, checkpoint: Path) -> Path:
    return checkpoint / t.draw.choice([WEIGHTS, TRAINING, MANIFEST])


def _cut(t: Trial, checkpoint: Path) -> None:
    path = _any_file(t, checkpoint)
    os.truncate(path, t.draw.randrange(path.stat().st_size - 1))


def _flip(t: Trial, checkpoint: Path) -> None:
    path = _any_file(t, checkpoint)
    data = bytearray(path.read_bytes())
    data[t.draw.randrange(len(data))] ^= 1 << t.draw.randrange(8)
    path.write_bytes(data)


def _swap(t: Trial, checkpoint: Path) -> None:
    others = [p for p in checkpoints_in(t.lab.reference / "checkpoints") if p.name != checkpoint.name]
    name = t.draw.choice([WEIGHTS, TRAINING, MANIFEST])
    shutil.copy(t.draw.choice(others) / name, checkpoint / name)


def _renamed(t: Trial, checkpoint: Path) -> None:
    """An older checkpoint under the newest one's name."""
    older = t.draw.choice(checkpoints_in(checkpoint.parent)[1:])
    shutil.rmtree(checkpoint)
    shutil.copytree(older, checkpoint)


def _foreign(t: Trial, checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(t.lab.foreign / "checkpoints" / checkpoint.name, checkpoint)


def _manifest(t: Trial, checkpoint: Path) -> None:
    """A value of the manifest, which still is JSON."""
    path = checkpoint / MANIFEST
    raw = json.loads(path.read_text())
    place = t.draw.choice([raw, raw["files"][WEIGHTS], raw["files"][TRAINING]])
    key = t.draw.choice(sorted(k for k, v in place.items() if not isinstance(v, dict)))
    place[key] = place[key] + 1 if isinstance(place[key], int) else place[key][::-1]
    path.write_text(json.dumps(raw, indent=1) + "\n")


def _leftovers(t: Trial, checkpoint: Path) -> None:
    partial = checkpoint.with_name(f".step-{STEPS:06d}.partial")
    partial.mkdir()
    (partial / WEIGHTS).write_bytes(t.draw.randbytes(1000))
    shutil.copytree(checkpoint, checkpoint.with_name(f".{checkpoint.name}.replaced"))
    if t.draw.random() < 0.5:  # died between the two renames
        shutil.rmtree(checkpoint)
    for name in (METRICS, "config.yaml", "versions.json", "verdict.json", "summary.json", "sample.txt"):
        (t.folder / f".{name}.partial").write_bytes(t.draw.randbytes(100))
    for name in (METRICS, ATTEMPTS):
        row = (t.folder / name).read_bytes().splitlines()[-1]
        with (t.folder / name).open("ab") as file:
            file.write(row[: t.draw.randrange(1, len(row))])


for _name, _damage in {
    "newest checkpoint: a file cut": _cut,
    "newest checkpoint: a bit flipped": _flip,
    "newest checkpoint: a file deleted": lambda t, c: _any_file(t, c).unlink(),
    "newest checkpoint: a file emptied": lambda t, c: _any_file(t, c).write_bytes(b""),
    "newest checkpoint: a file of another step": _swap,
    "newest checkpoint: another one, renamed": _renamed,
    "newest checkpoint: one of another run": _foreign,
    "newest checkpoint: its manifest altered": _manifest,
    "half-written lines, files and folders": _leftovers,
}.items():
    FAULTS[_name] = _damaged(_damage)


def _undone(t: Trial, harm: Callable[[], None], *named: str) -> str | None:
    """Harm that nothing can go on from: the start is refused, names ``named`` and changes nothing. Then it is undone."""
    kept = t.out / "kept"
    shutil.copytree(t.folder, kept)
    harm()
    wrong = t.refuses(*named)
    shutil.rmtree(t.folder)
    kept.rename(t.folder)
    return wrong


@fault("all checkpoints damaged")
def _(t: Trial) -> str | None:
    t.copy_of_reference(oldest=1)
    damages = [_cut, _flip, _manifest, _foreign, lambda t, c: _any_file(t, c).unlink()]
    place = t.folder / "checkpoints"

    def harm() -> None:
        for path in checkpoints_in(place):
            t.draw.choice(damages)(t, path)

    return _undone(t, harm, *(p.name for p in checkpoints_in(place)))


@fault("the metrics: a line altered, missing or twice, or all removed")
def _(t: Trial) -> str | None:
    t.copy_of_reference(oldest=1)
    path = t.folder / METRICS

    def harm() -> None:
        lines = path.read_bytes().splitlines(keepends=True)
        # Of the steps that the oldest checkpoint holds; the rows after it are computed again
        place = t.draw.randrange(EVERY)
        changed = t.draw.choice([[b'{"kind": \x00\xff\n'], [], [lines[place]] * 2, None])
        if changed is None:
            path.unlink()
        else:
            path.write_bytes(b"".join([*lines[:place], *changed, *lines[place + 1 :]]))

    return _undone(t, harm, METRICS)


@fault("a file where the checkpoints' folder should be")
def _(t: Trial) -> str | None:
    """In a new run, in one between two starts, or in one that trains."""
    when, place = t.draw.choice(["new", "between", "training"]), t.folder / "checkpoints"
    if when == "between":
        t.copy_of_reference(oldest=1)

        def harm() -> None:
            shutil.rmtree(place)
            place.touch()

        return _undone(t, harm, "checkpoints")
    if when == "new":
        t.folder.mkdir(parents=True)
        place.touch()
        wrong = t.refuses("checkpoints")
        place.unlink()
        return wrong
    pid, aside = t.start(), t.folder / "aside"
    t.after_rows(pid, t.draw.randrange(EVERY + 2, STEPS - 2))
    os.kill(pid, signal.SIGSTOP)  # else it may save between the two
    if place.is_dir():
        place.rename(aside)
    place.touch()
    os.kill(pid, signal.SIGCONT)
    wrong = t.expect(t.wait(pid), 3)
    place.unlink()
    if aside.is_dir():
        aside.rename(place)
    return wrong


def _shard(t: Trial) -> Path:
    return t.draw.choice(sorted(t.shards.glob("*/*-00000.bin")))


def _altered(t: Trial, path: Path) -> None:
    """Some tokens become others of the vocabulary, or a byte becomes any."""
    data = bytearray(path.read_bytes())
    start = 2 * t.draw.randrange(len(data) // 2 - 20)
    data[start : start + 40] = b"\x07\x00" * 20 if t.draw.random() < 0.5 else t.draw.randbytes(40)
    with path.open("r+b") as file:
        file.write(data)


def _cut_shard(t: Trial, path: Path) -> None:
    os.truncate(path, t.draw.randrange(path.stat().st_size))


def _touched(t: Trial, path: Path) -> None:
    os.utime(path, (0, t.draw.uniform(0, 4e9)))


def _shard_while_training(damage: Callable[[Trial, Path], None], *codes: int) -> Fault:
    """Between two rows of the curve, the last included."""

    def inject(t: Trial) -> str | None:
        path = _shard(t)
        good = path.read_bytes()
        pid = t.start()
        t.after_rows(pid, t.draw.randrange(1, STEPS + STEPS // EVALUATED + 1))
        os.kill(pid, signal.SIGSTOP)
        damage(t, path)
        os.kill(pid, signal.SIGCONT)
        ended = t.wait(pid)
        path.write_bytes(good)
        if ended == 0 and 0 not in codes:  # it may have ended before: then nothing was harmed
            return None if t.compared() == SURVIVED else f"complete on harmed data\n{t.said()[-2000:]}"
        return t.expect(ended, *codes)

    return inject


def _shard_between(damage: Callable[[Trial, Path], None], refused: bool) -> Fault:
    def inject(t: Trial) -> str | None:
        t.copy_of_reference(oldest=1)
        path = _shard(t)
        good = path.read_bytes()
        damage(t, path)
        if not refused:
            return None
        wrong = t.refuses(path.name)
        path.write_bytes(good)
        return wrong

    return inject


FAULTS["a shard cut while it is read"] = _shard_while_training(_cut_shard, 3)
FAULTS["a shard altered while it is read"] = _shard_while_training(_altered, 3)
FAULTS["a shard touched while it is read"] = _shard_while_training(_touched, 0)
FAULTS["a shard cut between two starts"] = _shard_between(_cut_shard, True)
FAULTS["a shard altered between two starts"] = _shard_between(_altered, True)
FAULTS["a shard touched between two starts"] = _shard_between(_touched, False)
