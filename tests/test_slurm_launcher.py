"""How an arm ends its process. Submission: test_submission.py, SLURM: cluster/."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from qtrain import interrupts, slurm_launcher
from qtrain.slurm_launcher import SlurmLauncher

ROOT = Path(__file__).parents[1]


def call(monkeypatch, outcome):
    """The exit status of an arm's process."""

    def arm(self, composed, number, state):
        if isinstance(outcome, BaseException):
            raise outcome
        done = JobReturn(status=JobStatus.FAILED if isinstance(outcome, str) else JobStatus.COMPLETED)
        done.return_value = ValueError(outcome) if isinstance(outcome, str) else outcome
        return done

    monkeypatch.setattr(SlurmLauncher, "_run", arm)
    monkeypatch.setattr(slurm_launcher.interrupts, "end_soon", lambda code: None)
    try:
        SlurmLauncher()(OmegaConf.create(), 0, None)
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


def test_the_same_sweep_runs_here_with_submitit_local(
    toy: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In processes of their own, which find the command and their config by what was pickled."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}:{ROOT / 'kernels'}")
    code, text = toy("-m", "hydra/launcher=submitit_local", "size=1,2", "recipe=knobs", "w=int4_row")
    assert code == 0, text
    assert sorted(Path("runs.txt").read_text().splitlines()) == ["nothing 1 int4_row", "nothing 2 int4_row"]
    code, text = toy("-m", "hydra/launcher=submitit_local", "size=1,0")
    assert (code, "size=0: must be at least 1" in text) == (2, True)
