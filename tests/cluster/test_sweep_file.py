"""sweep.json: what it holds, and that it is whole or not there."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path

import pytest

from qtrain.cluster import sweep_file
from qtrain.cluster.sweep_file import Arm, write_sweep

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
