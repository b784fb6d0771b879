"""How an arm ends its process. Submission: test_submission.py, SLURM: cluster/."""

from __future__ import annotations

import signal

import pytest
from hydra.core.utils import JobReturn, JobStatus

from qtrain import interrupts, slurm_launcher
from qtrain.slurm_launcher import SlurmLauncher


def call(monkeypatch, outcome):
    """The exit status of an arm's process."""

    def arm(self, *arguments):
        if isinstance(outcome, BaseException):
            raise outcome
        done = JobReturn(status=JobStatus.FAILED if isinstance(outcome, str) else JobStatus.COMPLETED)
        done.return_value = ValueError(outcome) if isinstance(outcome, str) else outcome
        return done

    monkeypatch.setattr(slurm_launcher.Base, "__call__", arm)
    monkeypatch.setattr(slurm_launcher.interrupts, "end_soon", lambda code: None)
    try:
        SlurmLauncher.__call__(SlurmLauncher(), [], "", 0, "", None)
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (0, 0), (3, 3), (2, 2), ("a bug", 1), (interrupts.Interrupted(signal.SIGTERM), 75),
        (interrupts.Interrupted(signal.SIGUSR1), 75), (interrupts.Interrupted(signal.SIGINT), 130),
    ],
)  # fmt: skip
def test_an_arm_ends_its_process_with_the_run_s_exit_status(monkeypatch, outcome, code):
    assert call(monkeypatch, outcome) == code
