"""Every way to stand: what the files say x whether the process lives x what the batch system says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qtrain.analysis.run_states import (
    SILENT_SECONDS,
    Standing,
    job_of,
    of_job,
    of_run,
    seconds_left,
    silent_after,
    work_left,
)
from qtrain.analysis.run_tail import RunTail, read_tail
from qtrain.cluster.queue import JobState

TASK = {"job": "123", "array_job": "120", "array_task": 3, "restarts": 0, "nodes": "n0", "partition": "main"}


def job(state: str, **more: Any) -> JobState:
    return JobState(name="120_3", job="123", state=state, **more)


@pytest.fixture
def tail(tmp_path: Path):
    """``tail(outcome=..., steps_done=...)``: of a run of 100 steps."""

    def make(
        outcome: str | None = None, steps_done: int = 20, attempts: tuple[int, ...] = (0,), slurm: Any = None
    ) -> RunTail:
        (tmp_path / "config.yaml").write_text("name: train\nseed: 0\nsteps: 100\n")
        rows = [
            {"kind": "train", "step": s, "loss": 2.0, "seconds": 0.5 * s} for s in range(1, steps_done + 1)
        ]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines = [{"attempt": i, "step": s, "host": "n7", "slurm": slurm} for i, s in enumerate(attempts)]
        (tmp_path / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if outcome is not None:
            verdict = {"outcome": outcome, "step": steps_done, "message": f"message of {outcome}"}
            (tmp_path / "verdict.json").write_text(json.dumps(verdict))
        found = read_tail(tmp_path)
        assert found is not None
        return found

    return make


PENDING, RUNNING = job("PENDING", reason="Resources"), job("RUNNING", nodes="n1")


@pytest.mark.parametrize(
    ("outcome", "alive", "batch", "state"),
    [
        (None, True, None, "running"),
        (None, False, None, "lost"),
        (None, None, RUNNING, "running"),
        (None, False, RUNNING, "running"),  # another process on the same node held the lock before
        (None, None, PENDING, "requeued"),
        (None, None, job("TIMEOUT", time_limit="1:00"), "failed"),
        (None, None, job("NODE_FAIL", nodes="n1"), "failed"),
        (None, None, job("OUT_OF_MEMORY"), "failed"),
        (None, None, job("FAILED", exit_code="1"), "failed"),
        (None, None, job("COMPLETED"), "failed"),  # the job ended well, and the run left no verdict
        (None, None, job("CANCELLED", reason="by me"), "cancelled"),
        (None, True, job("CANCELLED"), "running"),  # what lives, lives
        ("interrupted", False, None, "interrupted"),
        ("interrupted", None, PENDING, "requeued"),
        ("interrupted", None, RUNNING, "starting"),
        ("interrupted", True, None, "starting"),
        ("interrupted", None, job("CANCELLED"), "cancelled"),
        ("interrupted", None, job("TIMEOUT"), "interrupted"),
        ("completed", False, None, "completed"),
        ("completed", True, RUNNING, "completed"),
        ("completed", None, job("TIMEOUT"), "completed"),
        ("non_finite", None, job("FAILED"), "diverged"),
        ("census_failed", False, None, "stopped"),
        ("storage_failed", None, PENDING, "stopped"),
    ],
)
def test_a_run_stands(tail, outcome, alive, batch, state: str) -> None:
    found = tail(outcome)
    assert of_run(found, alive, batch, found.written).state == state


def test_whys(tail) -> None:
    found = tail()
    why = {
        state: of_run(found, None, job(state, **more), 0).why
        for state, more in {
            "TIMEOUT": {"time_limit": "1:00"}, "NODE_FAIL": {"nodes": "n1"}, "PENDING": {"reason": "BeginTime"},
            "FAILED": {"exit_code": "7", "reason": "NonZeroExitCode"}, "CANCELLED": {"reason": "by root"},
        }.items()
    }  # fmt: skip
    assert why == {
        "TIMEOUT": "its time limit of 1:00 was over", "NODE_FAIL": "its node n1 failed", "PENDING": "BeginTime",
        "FAILED": "FAILED, exit code 7, NonZeroExitCode", "CANCELLED": "by root",
    }  # fmt: skip
    assert of_run(tail("census_failed"), False, None, 0).why == "census_failed: message of census_failed"


def test_on_another_machine_without_slurm_it_is_told_by_what_it_writes(tail) -> None:
    found = tail()
    assert of_run(found, None, None, found.written + SILENT_SECONDS - 1).state == "running"
    silent = of_run(found, None, None, found.written + SILENT_SECONDS + 1)
    assert silent.state == "silent"
    assert "n7" in str(silent.why)
    assert silent_after(120.0) == 2400  # steps of two minutes


def test_a_run_that_has_done_no_step_of_this_attempt_is_starting(tail) -> None:
    assert of_run(tail(steps_done=0), True, None, 0).state == "starting"
    assert of_run(tail(steps_done=20, attempts=(0, 20)), True, None, 0).state == "starting"
    assert of_run(tail(steps_done=21, attempts=(0, 20)), True, None, 0).state == "running"
    assert of_run(tail(steps_done=0, attempts=()), None, PENDING, 0).state == "queued"


def test_of_a_job_alone() -> None:
    assert of_job(PENDING) == Standing("queued", "Resources")
    assert of_job(RUNNING) == Standing("starting")
    assert of_job(job("CONFIGURING")) == Standing("starting", "configuring")
    assert of_job(job("CANCELLED", reason="by me")) == Standing("cancelled", "by me")
    assert of_job(job("FAILED", exit_code="signal 9")) == Standing("failed", "FAILED, signal 9")


def test_job_of(tail) -> None:
    assert job_of(tail()) is None
    assert job_of(tail(slurm=TASK)) == "120_3"
    assert job_of(tail(slurm={**TASK, "array_job": None, "array_task": None})) == "123"
    assert job_of(tail(slurm="garbage")) is None


def test_seconds_left_is_steps_times_pace(tail) -> None:
    found = tail()  # 20 of 100, half a second each
    assert seconds_left(found, Standing("running"), found.written) == pytest.approx(40)
    assert seconds_left(found, Standing("running"), found.written + 15) == pytest.approx(25)
    assert seconds_left(found, Standing("requeued"), found.written + 15) == pytest.approx(40)
    assert seconds_left(found, Standing("running"), found.written + 1000) == 0
    assert seconds_left(tail(steps_done=1), Standing("running"), 0) is None


@pytest.mark.parametrize(
    ("left", "running", "expected"),
    [
        ([], [], 0.0),
        ([None, None], [], None),
        ([100.0], [100.0], 100.0),
        ([100.0, 50.0], [100.0, 50.0], 100.0),  # side by side
        ([100.0, 50.0, 150.0, 150.0], [100.0, 50.0], 225.0),  # two at once
        ([100.0, None], [100.0], 200.0),  # what is not known is like the others
        ([400.0, 10.0, 10.0], [400.0, 10.0], 400.0),
        ([60.0, 60.0], [], 120.0),
    ],
)
def test_work_left(left, running, expected) -> None:
    assert work_left(left, running) == expected
