"""sweep.json: what it holds, that it is whole or not there, and what is read from it."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import pytest

from qtrain.cluster import sweep_file
from qtrain.cluster.sweep_file import (
    Arm,
    read_sweep,
    sweeps_below,
    take_folder,
    write_local_sweep,
    write_sweep,
)

ARMS = [
    Arm(i, f"120_{i}", ("w=int8_row", f"seed={i}"), f"outputs/train/r{i}", f"/logs/120_{i}.out")
    for i in range(2)
]


def test_the_file_says_which_job_is_which_run(tmp_path):
    path = write_sweep(tmp_path, "train", "120", ARMS, Path("/work"))
    assert path == tmp_path / "sweep.json"
    found = json.loads(path.read_text())
    age = datetime.now(timezone.utc) - datetime.fromisoformat(found.pop("submitted_at"))
    assert 0 <= age.total_seconds() + 1 < 60
    assert found == {
        "command": "train", "launcher": "slurm", "job": "120", "cwd": "/work",
        "arms": [
            {"number": i, "job": f"120_{i}", "overrides": ["w=int8_row", f"seed={i}"], "folder": f"outputs/train/r{i}",
             "log": f"/logs/120_{i}.out"} for i in range(2)
        ],
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    before = write_sweep(tmp_path, "train", "1", ARMS, Path("/work")).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sweep_file.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_sweep(tmp_path, "train", "2", ARMS, Path("/work"))
    assert (tmp_path / "sweep.json").read_bytes() == before


def test_each_of_those_that_come_at_once_gets_a_folder_of_its_own(tmp_path):
    start = threading.Barrier(8)

    def take(_: int) -> Path:
        start.wait()
        return take_folder(tmp_path / "2026-11-26" / "19-02-11", named=False)

    with ThreadPoolExecutor(8) as threads:
        taken = list(threads.map(take, range(8)))
    assert sorted(path.name for path in taken) == ["19-02-11", *(f"19-02-11-{n}" for n in range(2, 9))]
    assert sorted(taken) == sorted((tmp_path / "2026-11-26").iterdir())
    with pytest.raises(FileExistsError):
        take_folder(tmp_path / "2026-11-26" / "19-02-11", named=True)


SWEEP = {
    "command": "train", "submitted_at": "2026-11-26T19:02:11+00:00", "launcher": "slurm", "job": "120", "cwd": "/work/me",
    "arms": [
        {"number": 0, "job": "120_0", "overrides": ["w=int8_row", "seed=0"], "folder": "outputs/train/a", "log": "/logs/120_0_0_log.out"},
        {"number": 1, "job": "120_1", "overrides": ["w=int4_row"], "folder": "/scratch/train/b", "log": None},
    ],
}  # fmt: skip


def written(folder: Path, value: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def test_folders_are_relative_to_where_it_was_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = written(tmp_path / "multirun/2026-11-26/19-02-11", SWEEP)
    sweep = read_sweep(folder)
    assert sweep == read_sweep(folder / "sweep.json")
    assert (sweep.folder, sweep.launcher, sweep.submitted_at) == (
        folder,
        "slurm",
        "2026-11-26T19:02:11+00:00",
    )
    first, second = sweep.arms
    assert (first.job, first.overrides, first.number) == ("120_0", ("w=int8_row", "seed=0"), 0)
    assert first.folder == Path("/work/me/outputs/train/a")
    assert first.log == Path("/logs/120_0_0_log.out")
    assert (second.folder, second.log) == (Path("/scratch/train/b"), None)
    here = written(tmp_path / "multirun/2026-11-27/08-00-00", {**SWEEP, "cwd": str(tmp_path)})
    assert read_sweep(here).arms[0].folder == Path("outputs/train/a")
    assert sweeps_below(Path("multirun")) == [
        Path("multirun/2026-11-26/19-02-11"),
        Path("multirun/2026-11-27/08-00-00"),
    ]


def test_no_sweep_and_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no sweep.json, which qtrain train -m leaves"):
        read_sweep(tmp_path)
    for i, bad in enumerate(
        ["{", "[]", '{"arms": [{}]}', '{"arms": 3}', '{"arms": [{"number": "x", "overrides": []}]}']
    ):
        with pytest.raises(ValueError, match="does not hold a sweep"):
            read_sweep(written(tmp_path / str(i), bad))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, **options: str) -> str:
        raise PermissionError(13, "Permission denied")

    folder = written(tmp_path / "a", SWEEP)
    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(ValueError, match=r"does not hold a sweep \(PermissionError"):
        read_sweep(folder)


def test_a_local_sweep_names_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_local_sweep(
        Path("multirun/2026-11-26/19-02-11"), "train", [["w=int8_row"], ["w=int4_row"]], [None, "outputs/b"]
    )
    assert [p.name for p in path.parent.iterdir()] == ["sweep.json"]
    # This process is pytest's, and says nothing of qtrain but its paths
    monkeypatch.setattr("qtrain.cluster.sweep_file._named_so", lambda process: process == os.getpid())
    first, second = read_sweep(path.parent).arms
    assert (first.overrides, first.job, first.folder, first.lives) == (("w=int8_row",), None, None, True)
    assert second.folder == Path("outputs/b")
    assert second.since == json.loads(path.read_text())["submitted_at"]
    value = json.loads(path.read_text())
    for change, lives in (
        ({"host": "another"}, None),
        ({"process": 2**22 + 1}, False),
        ({"process": None}, None),
    ):
        path.write_text(json.dumps({**value, **change}))
        assert read_sweep(path.parent).arms[0].lives is lives
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    other = subprocess.Popen(["sleep", "60"])  # whose number was once that of a sweep
    try:
        path.write_text(json.dumps({**value, "process": other.pid}))
        assert read_sweep(path.parent).arms[0].lives is False
    finally:
        other.kill()
        other.wait()
