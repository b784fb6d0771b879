from __future__ import annotations

import json
from pathlib import Path

import pytest

from qtrain.cluster.submitted_sweep import read_sweep, sweeps_below

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
    with pytest.raises(ValueError, match=r"there is no sweep.json, which sweeps have that were submitted"):
        read_sweep(tmp_path)
    for i, bad in enumerate(
        ["{", "[]", '{"arms": [{}]}', '{"arms": 3}', '{"arms": [{"number": "x", "overrides": []}]}']
    ):
        with pytest.raises(ValueError, match="does not hold a sweep"):
            read_sweep(written(tmp_path / str(i), bad))
