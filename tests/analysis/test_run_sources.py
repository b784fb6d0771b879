"""What a user names as runs, and what is found there."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up_runs import healthy_losses, write_curve_run

from qtrain.analysis.run_sources import places, read_all


def test_folders_of_folders_globs_and_single_runs_each_once(tmp_path: Path) -> None:
    out = tmp_path / "outputs"
    for name in ("a", "b"):
        for seed in (0, 1):
            write_curve_run(out, name, seed, healthy_losses(30, seed))
    (out / "comparison").mkdir()
    (out / "comparison" / "comparison.json").write_text("{}")
    (out / "a" / "seed0" / "wandb" / "offline-run-1").mkdir(parents=True)
    (out / "a" / "seed0" / "wandb" / "offline-run-1" / "run-1.wandb").write_text("")
    (out / "a" / ".hidden").mkdir()
    found = places([str(out)])
    assert [str(p.relative_to(out)) for p in found] == ["a/seed0", "a/seed1", "b/seed0", "b/seed1"]
    assert places([str(out / "a"), str(out / "*" / "seed1"), str(out / "a" / "seed0")]) == [
        out / "a" / "seed0", out / "a" / "seed1", out / "b" / "seed1",
    ]  # fmt: skip
    assert [(run.name, run.seed) for run in read_all(found)] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_a_run_that_lost_files_is_a_run_and_nothing_is_an_error(tmp_path: Path) -> None:
    run = write_curve_run(tmp_path, "a", 0, healthy_losses(30, 0))
    (run / "config.yaml").unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "other"
    (other / "inner").mkdir(parents=True)
    found = places([str(run), str(empty)])
    assert [r.state for r in read_all(found)] == ["unreadable", "unreadable"]
    with pytest.raises(ValueError, match="other holds no run"):
        places([str(other)])
    with pytest.raises(ValueError, match=r"there is no .*nowhere"):
        places([str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="name at least one"):
        places([])
