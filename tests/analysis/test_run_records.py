"""What became of a run is read from its folder, and never guessed."""

from __future__ import annotations

import math

import pytest
from made_up_runs import write_run

from qtrain.analysis.run_records import read_run, read_runs


def test_a_completed_run(tmp_path) -> None:
    run = read_run(write_run(tmp_path, "a", 4, 2.5, spikes=(70,), clipped_every=4, tokens_per_s=123.0))
    assert (run.state, run.problem, run.name, run.seed, run.val_loss) == ("completed", None, "a", 4, 2.5)
    assert (run.clip_share, run.tokens_per_s, run.spikes) == (0.25, 123.0, (70,))
    curves = run.curves
    assert (curves.val_step.tolist(), curves.val_loss.tolist()) == ([50, 100], [2.6, 2.5])
    assert (len(curves), curves.loss[70], curves.tokens[-1]) == (100, 5.01, 3200)


@pytest.mark.parametrize(
    ("loss", "more", "state", "says"),
    [
        (3.0, {"best": 2.4}, "diverged", "rose from 2.400 to 3.000"),
        (2.8, {"best": 2.4}, "completed", None),  # a bad end, and no divergence
        (math.nan, {}, "diverged", "validation loss is nan"),
        (None, {"outcome": "non_finite"}, "stopped", "non_finite at step 33: made up"),
        (None, {"outcome": "interrupted"}, "stopped", "interrupted at step 33"),
        (None, {"outcome": None}, "unfinished", "no verdict after step 60 of 100"),
        (None, {"outcome": "completed"}, "unreadable", "has no summary.json"),
    ],
)
def test_what_became_of_others(tmp_path, loss, more, state: str, says: str | None) -> None:
    run = read_run(write_run(tmp_path, "a", 0, loss, **more))
    assert run.state == state
    assert (run.problem is None) if says is None else says in run.problem
    assert run.completed == (state == "completed")


def test_broken_folders_are_records_too(tmp_path) -> None:
    cut = write_run(tmp_path, "a", 0, 2.5)
    (cut / "metrics.jsonl").write_text('{"kind": "tr\n' + (cut / "metrics.jsonl").read_text())
    (tmp_path / "a" / "empty").mkdir()
    odd = write_run(tmp_path, "a", 2, 2.5)
    (odd / "config.yaml").write_text("a: [")
    runs = read_runs(tmp_path, ["a", "nothing"])
    assert [run.folder.name for run in runs] == ["empty", "seed0", "seed2"]
    assert {run.state for run in runs} == {"unreadable"}
    assert "line 1 of metrics.jsonl" in runs[1].problem
    assert all(run.name == "a" for run in runs)
