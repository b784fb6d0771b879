"""Which exit of a run leads to another attempt: what the module decides, asks and prints. SLURM's part: test_real_slurm.py."""

from __future__ import annotations

import pytest

from qtrain import interrupts
from qtrain.cluster import requeue
from qtrain.cluster.requeue import AGAIN, decide
from qtrain.cluster.slurm_job import SlurmJob

RUNNING = {"JobState": "RUNNING", "Requeue": "1"}
JOB = SlurmJob("123", "120", 3, restarts=2)
LINE = "JobId=123 ArrayJobId=120 JobState={} Reason=None Requeue=1 Restarts=2 ExitCode=0:0 Command=/a b=c\n"


def test_the_codes_are_those_of_interrupted_runs():
    """75, and 128 + 10 and 128 + 15 of a process that died before it had handlers."""
    assert {interrupts.TRY_AGAIN, 138, 143} == AGAIN
    assert interrupts.exit_code(2) not in AGAIN  # Ctrl-C in an interactive job


@pytest.mark.parametrize("code", [75, 138, 143])
def test_a_stopped_run_goes_on_while_the_job_is_slurm_s_to_give(code):
    assert decide(code, 0, RUNNING)[0]
    for state in ("COMPLETING", "CANCELLED", "TIMEOUT", "PREEMPTED", "REQUEUED", "NODE_FAIL"):
        again, why = decide(code, 0, {**RUNNING, "JobState": state})
        assert not again
        assert state in why
    assert not decide(code, 0, {})[0]


@pytest.mark.parametrize("code", [0, 1, 2, 3, 130, 137, 134])
def test_a_result_an_error_and_a_verdict_do_not(code):
    assert not decide(code, 0, RUNNING)[0]


def test_not_for_ever_and_not_against_the_user():
    assert decide(75, 9, RUNNING, most=10)[0]
    again, why = decide(75, 10, RUNNING, most=10)
    assert not again
    assert "10 times" in why
    assert decide(75, 0, {**RUNNING, "Requeue": "0"}) == (False, "the job was submitted with --no-requeue")


def run(monkeypatch, code, state, refuses=None):
    """-> (exit status, what scontrol was asked)"""
    asked = []

    def scontrol(*words):
        asked.append(words)
        if words[0] == refuses:
            raise RuntimeError("scontrol requeue 120_3: Requested operation is presently disabled")
        return LINE.format(state)

    for name, value in {
        "JOB_ID": "123",
        "ARRAY_JOB_ID": "120",
        "ARRAY_TASK_ID": "3",
        "RESTART_COUNT": "2",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(requeue, "scontrol", scontrol)
    return requeue.main([str(code)]), asked


def test_main_asks_of_its_own_job_and_keeps_the_exit_status(monkeypatch, capsys):
    assert run(monkeypatch, 75, "RUNNING") == (75, [("-o", "show", "job", "120_3"), ("requeue", "120_3")])
    assert "job 120_3 is requeued: attempt 3 was stopped by a signal" in capsys.readouterr().err
    assert run(monkeypatch, 75, "COMPLETING") == (75, [("-o", "show", "job", "120_3")])
    assert "is not requeued: the job is COMPLETING" in capsys.readouterr().err


@pytest.mark.parametrize("code", [0, 3])
def test_main_asks_nothing_where_there_is_nothing_to_ask(monkeypatch, capsys, code):
    assert run(monkeypatch, code, "RUNNING") == (code, [])
    assert capsys.readouterr().err == ""


def test_a_refusal_of_slurm_is_said(monkeypatch, capsys):
    code, _ = run(monkeypatch, 75, "RUNNING", refuses="requeue")
    assert code == 75
    assert "could not be requeued" in (said := capsys.readouterr().err)
    assert "presently disabled" in said


def test_outside_of_a_job_nothing_is_asked(monkeypatch, capsys):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(requeue, "scontrol", lambda *words: pytest.fail("asked"))
    assert requeue.main(["75"]) == 75
    assert "no job of SLURM" in capsys.readouterr().err


def test_a_missing_scontrol_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no scontrol here"):
        requeue.scontrol("show", "job", "1")
