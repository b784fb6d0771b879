"""What the cluster of the tests may touch: its own processes, and nothing of a SLURM that the machine belongs to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_daemons
from slurm_daemons import Slurm

SLEEPS = [sys.executable, "-S", "-c", "import time; print(flush=True); time.sleep(60)"]


@pytest.fixture
def sleeping() -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    found: dict[str, subprocess.Popen[bytes]] = {}
    yield found
    for process in found.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("job", "killed"), [("3", {"mine", "step"}), (None, {"mine", "step", "mine too", "step too"})]
)
def test_only_processes_of_its_own_jobs_are_killed(
    tmp_path: Path, sleeping: dict[str, subprocess.Popen[bytes]], job: str | None, killed: set[str]
) -> None:
    conf = f"{tmp_path}/slurm.conf"
    log = (tmp_path / "slurmd.log").open("w")

    def start(name: str, argv0: str = "python", stderr: object = None, **variables: str) -> None:
        sleeping[name] = subprocess.Popen(
            [argv0, *SLEEPS[1:]],
            executable=SLEEPS[0],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=stderr,  # type: ignore[call-overload]
        )
        assert sleeping[name].stdout.readline()  # type: ignore[union-attr]

    start("mine", SLURM_CONF=conf, SLURM_JOB_ID="3")
    start("mine too", SLURM_JOB_ID="33", SLURM_CONF=conf)
    start("user of it", SLURM_CONF=conf)
    start("another cluster's", SLURM_CONF="/etc/slurm/slurm.conf", SLURM_JOB_ID="3")
    start("of a cluster without a name", SLURM_JOB_ID="3")
    start("step", "slurmstepd: [3.batch]", log)
    start("step too", "slurmstepd: [33.0]", log)
    start("another cluster's step", "slurmstepd: [3.batch]")
    Slurm(tmp_path, {}).kill_processes(job)
    for name in killed:
        assert sleeping[name].wait(20) == -9
    assert {name for name, process in sleeping.items() if process.poll() is None} == set(sleeping) - killed


def test_it_hears_nothing_of_the_machine_s_own_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "SLURM_JOB_ID",
        "SLURM_CONF",
        "SBATCH_PARTITION",
        "SLURM_CLUSTERS",
        "SCANCEL_USER",
        "SQUEUE_USERS",
    ):
        monkeypatch.setenv(name, "theirs")
    found = slurm_daemons._own_environment()
    assert "theirs" not in found.values()
    assert found["PATH"] == os.environ["PATH"]
