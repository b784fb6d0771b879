"""A sweep of SLURM as it looks from outside: arms that wait, train, were requeued, failed in every way or never began."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from qtrain.analysis.survey import Survey, as_json, survey
from qtrain.cluster.queue import JobState, Queue
from qtrain.cluster.sweep_file import ArmPlace

NODE = {"array_job": "120", "restarts": 0, "nodes": "n1", "partition": "main"}


class Sweep:
    """Arms in a folder, and what SLURM says of them."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.arms: list[ArmPlace] = []
        self.jobs: dict[str, JobState] = {}
        self.asked: list[str] = []
        self.lives: dict[Path, bool] = {}
        self.answers = True

    def arm(self, state: str | None, *, log: str | None = None, **more: Any) -> Path:
        """A submitted arm; SLURM does not know its job where state is None."""
        number = len(self.arms)
        name, folder = f"120_{number}", self.place / "outputs" / "train" / f"arm{number}"
        path = self.place / f"{name}_0_log.out"
        if log is not None:
            path.write_text(log)
        overrides = (f"w=int{number}_row", "seed=0", f"run=arm{number}", "resume=auto")
        self.arms.append(ArmPlace(number, overrides, name, folder, path))
        if state is not None:
            self.jobs[name] = JobState(name=name, job=str(130 + number), state=state, **more)
        return folder

    def begun(
        self, folder: Path, steps_done: int, outcome: str | None = None, attempts: int = 1, slurm: bool = True
    ) -> Path:
        number = folder.name.removeprefix("arm")
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"name: train\nseed: 0\nsteps: 100\nw: int{number}_row\n")
        job = {"job": "999", "array_task": int(number), **NODE} if slurm else None
        lines = [{"attempt": i + 1, "step": 0, "host": "n1", "slurm": job} for i in range(attempts)]
        (folder / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        rows = [
            {"kind": "train", "step": s, "loss": 3.0 - 0.01 * s, "seconds": 2.0 * s}
            for s in range(1, steps_done + 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if outcome is not None:
            verdict = {"outcome": outcome, "step": steps_done, "message": f"{outcome} by somebody"}
            (folder / "verdict.json").write_text(json.dumps(verdict))
        return folder

    def look(self, *folders: Path) -> Survey:
        def ask(names: Any) -> Queue:
            self.asked = list(names)
            return Queue({n: self.jobs[n] for n in self.asked if n in self.jobs}, (), self.answers)

        return survey(folders, self.arms, alive=self.lives.get, ask=ask, now=time.time())


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path)


def test_the_arms_of_a_sweep(sweep: Sweep) -> None:
    sweep.arm("PENDING", reason="Resources")
    sweep.begun(sweep.arm("RUNNING", nodes="n0"), 40)
    sweep.begun(sweep.arm("PENDING", reason="BeginTime"), 30, "interrupted", attempts=2)
    sweep.begun(sweep.arm("COMPLETED"), 100, "completed")
    sweep.begun(sweep.arm("TIMEOUT", time_limit="1:00", log="step 60/100\n"), 60)
    sweep.arm("FAILED", exit_code="1", log="Traceback (most recent call last):\nValueError: no such data\n")
    sweep.arm(None)
    found = sweep.look()
    states = {row.label: row.state for row in found.rows}
    assert states == {
        "w=int1_row": "running", "w=int2_row": "requeued", "w=int3_row": "completed", "w=int4_row": "failed",
        "w=int0_row": "queued", "w=int5_row": "failed", "w=int6_row": "lost",
    }  # fmt: skip
    assert list(states) == [f"w=int{i}_row" for i in range(7)]  # in the order of the arms
    assert "120_3" not in sweep.asked  # it has its verdict
    rows = {row.job: row for row in found.rows}
    assert rows["120_1"].node == "n0"
    assert rows["120_2"].attempts == 2
    assert rows["120_2"].standing.why == "BeginTime"
    assert rows["120_4"].standing.why == "its time limit of 1:00 was over"
    assert rows["120_5"].cause is not None
    assert rows["120_5"].cause.line == "ValueError: no such data"
    assert str(rows["120_5"].command).startswith(
        "qtrain train -m hydra/launcher=slurm w=int5_row seed=0 name=train run=arm5 resume=auto"
    )
    assert rows["120_1"].command is rows["120_2"].command is rows["120_3"].command is None
    assert "SLURM no longer knows its job" in str(rows["120_6"].standing.why)
    assert {row.job for row in found.troubled} == {"120_4", "120_5", "120_6"}
    # Two seconds a step: 60 steps run, 70 wait, and the queued arm counts as the mean of both; one at a time
    assert found.left == pytest.approx(120 + 140 + 130, abs=5)


def test_an_arm_that_was_resumed_by_hand_belongs_to_no_job(sweep: Sweep) -> None:
    folder = sweep.begun(sweep.arm("CANCELLED"), 40, slurm=False)
    sweep.lives[folder] = True
    assert [(row.state, row.job) for row in sweep.look().rows] == [("running", None)]
    sweep.lives[folder] = False
    assert [(row.state, row.job) for row in sweep.look().rows] == [("lost", None)]


def test_where_slurm_does_not_answer_nothing_is_called_lost(sweep: Sweep) -> None:
    sweep.arm(None)
    sweep.answers = False
    (row,) = sweep.look().rows
    assert (row.state, row.trouble) == ("silent", True)
    assert "SLURM could not be asked" in str(row.standing.why)


def test_a_run_that_diverged_and_trains_on_is_trouble(sweep: Sweep) -> None:
    folder = sweep.begun(sweep.arm("RUNNING"), 0)
    losses = [3.0 - 0.01 * s for s in range(60)] + [5.0] * 30
    rows = [
        {"kind": "train", "step": s, "loss": x, "seconds": 2.0 * s} for s, x in enumerate(losses, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (row,) = sweep.look().rows
    assert (row.state, row.verdict, row.trouble) == ("running", "diverged", True)


def test_folders_that_are_named_twice_are_one_row(sweep: Sweep) -> None:
    folder = sweep.begun(sweep.arm("RUNNING"), 40)
    assert len(sweep.look(folder, folder / ".." / "arm0").rows) == 1


def test_an_arm_that_was_submitted_again_is_one_row(sweep: Sweep) -> None:
    folder = sweep.begun(sweep.arm("FAILED"), 40)
    again = ArmPlace(0, ("w=int0_row", "run=arm0"), "140", folder, None)
    sweep.arms.append(again)
    sweep.jobs["140"] = JobState(name="140", job="140", state="PENDING", reason="Priority")
    (row,) = sweep.look().rows
    # Its last attempt was of the first job; that ended, and the new one has not begun
    assert (row.state, row.job) == ("requeued", "140")


def test_a_folder_that_vanished_is_no_row(sweep: Sweep, tmp_path: Path) -> None:
    found = sweep.look(tmp_path / "gone")
    assert (found.rows, found.left, found.under_way) == ((), 0.0, False)


def test_json_has_no_nan_and_every_field(sweep: Sweep) -> None:
    folder = sweep.begun(sweep.arm("RUNNING"), 40)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 41, "loss": "nan", "seconds": 82.0}\n')
    sweep.arm("PENDING", reason="Priority")
    text = json.dumps(as_json(sweep.look()), allow_nan=False)
    first, second = json.loads(text)["runs"]
    assert first["loss"] == "nan"
    assert first.keys() == second.keys()
    assert (second["state"], second["why"], second["step"], second["loss"]) == ("queued", "Priority", 0, None)
