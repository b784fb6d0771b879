"""Waiting for the jobs of a sweep: what is printed when, and how it ends."""

from __future__ import annotations

import signal

import pytest

from qtrain import interrupts
from qtrain.cluster import waiting
from qtrain.cluster.queue import JobState, Queue
from qtrain.cluster.sweep_file import Arm
from qtrain.cluster.waiting import exit_status, wait_for

ARMS = [
    Arm(i, f"7_{i}", (f"w={w}", "seed=0", f"run=r{i}"), f"outputs/train/r{i}", f"/log{i}")
    for i, w in enumerate(("int8_row", "none"))
]


def queue(*states: str | JobState, asked: bool = True) -> Queue:
    jobs = [JobState(f"7_{i}", str(8 + i), s) if isinstance(s, str) else s for i, s in enumerate(states)]
    return Queue({job.name: job for job in jobs}, (), asked)


@pytest.mark.parametrize(
    ("state", "code", "status"),
    [
        ("COMPLETED", None, 0), ("FAILED", "3", 3), ("FAILED", "1", 1), ("FAILED", None, 1), ("FAILED", "signal 9", 137),
        ("CANCELLED", None, 130), ("CANCELLED", "75", 130), ("TIMEOUT", None, 1), ("TIMEOUT", "75", 75), ("NODE_FAIL", None, 1),
        ("OUT_OF_MEMORY", "signal 9", 137),
    ],
)  # fmt: skip
def test_an_arm_s_exit_status_is_its_job_s(state, code, status):
    assert exit_status(JobState("7_0", "8", state, exit_code=code)) == status


@pytest.fixture
def answers(monkeypatch):
    """answers(*queues): what SLURM says, one a look; the names that it was asked for."""
    asked = []

    def play(*queues):
        left = list(queues)

        def ask(names):
            asked.append(list(names))
            return left.pop(0)

        monkeypatch.setattr(waiting, "ask_slurm", ask)
        monkeypatch.setattr(waiting.time, "sleep", lambda seconds: None)
        return asked

    return play


def test_waiting_shows_changes_and_ends_with_the_last(answers, capsys):
    failed = JobState("7_1", "9", "FAILED", exit_code="3")
    waits = JobState("7_0", "8", "PENDING", reason="Priority")
    asked = answers(
        queue(waits, "RUNNING"), queue(waits, "RUNNING"), queue("RUNNING", failed), queue("COMPLETED")
    )
    assert wait_for(ARMS, 1) == [0, 3]
    assert asked == [["7_0", "7_1"]] * 3 + [["7_0"]]
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "7_0 PENDING (Priority)  w=int8_row",
        "7_1 RUNNING  w=none",
        "7_0 RUNNING  w=int8_row",
        "7_1 FAILED, exit code 3  w=none; /log1",
        "7_0 COMPLETED  w=int8_row",
    ]


def test_a_requeued_job_is_waited_for(answers, capsys):
    answers(queue("RUNNING", "COMPLETED"), queue("PENDING"), queue("RUNNING"), queue("COMPLETED"))
    assert wait_for(ARMS, 1) == [0, 0]
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()].count("RUNNING") == 2


def test_a_job_that_slurm_has_forgotten_ends_the_wait_and_a_deaf_slurm_does_not(answers, capsys):
    answers(queue("COMPLETED", asked=False), *[queue(asked=False)] * 5, *[queue()] * 3)
    assert wait_for(ARMS, 1) == [0, 1]
    assert "7_1 is unknown to SLURM; how it ended stands in /log1" in capsys.readouterr().err


def test_looks_that_miss_a_job_count_in_a_row_only(answers):
    answers(
        *[queue("RUNNING", "RUNNING"), queue("RUNNING"), queue("RUNNING")] * 3,
        queue("COMPLETED", "COMPLETED"),
    )
    assert wait_for(ARMS, 1) == [0, 0]


def test_ctrl_c_leaves_the_jobs(answers, monkeypatch, capsys):
    answers(queue("RUNNING", "RUNNING"))

    def stop(seconds):
        raise interrupts.Interrupted(signal.SIGINT)

    monkeypatch.setattr(waiting.time, "sleep", stop)
    with pytest.raises(interrupts.Interrupted):
        wait_for(ARMS, 1)
    assert "the jobs go on: qtrain status shows them, scancel 7 ends them" in capsys.readouterr().err
