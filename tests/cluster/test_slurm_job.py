"""The variables below are those of real jobs of SLURM 22.05."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from qtrain.cluster.slurm_job import SlurmJob

JOB = {
    "SLURM_JOB_ID": "123",
    "SLURM_JOB_NODELIST": "n[0-1]",
    "SLURM_JOB_PARTITION": "main",
    "SLURM_NTASKS": "2",
}
TASK = {**JOB, "SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}


def test_outside_of_a_job_there_is_none():
    assert SlurmJob.here({}) is None
    assert SlurmJob.here({"SLURM_JOB_ID": "", "SLURM_CONF": "/etc/slurm.conf"}) is None


def test_a_job():
    job = SlurmJob.here(JOB)
    assert job == SlurmJob(job="123", nodes="n[0-1]", partition="main")
    assert job.name == "123"
    assert asdict(job) == {
        "job": "123", "array_job": None, "array_task": None, "restarts": 0, "nodes": "n[0-1]", "partition": "main",
    }  # fmt: skip


def test_a_task_of_an_array_is_named_by_the_array():
    job = SlurmJob.here(TASK)
    assert (job.job, job.array_job, job.array_task, job.name) == ("123", "120", 3, "120_3")
    assert SlurmJob.here({**TASK, "SLURM_ARRAY_TASK_ID": "0"}).name == "120_0"


def test_a_requeued_job_counts_its_restarts():
    assert SlurmJob.here({**JOB, "SLURM_RESTART_COUNT": "2"}).restarts == 2


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SLURM_JOB_ID", "1; rm -rf"),
        ("SLURM_ARRAY_TASK_ID", "x"),
        ("SLURM_ARRAY_TASK_ID", ""),
        ("SLURM_RESTART_COUNT", "-1"),
    ],
)
def test_what_slurm_would_not_set_is_refused_by_name(variable, value):
    with pytest.raises(ValueError, match=f"{variable}='{value}'.*unset"):
        SlurmJob.here({**TASK, variable: value})
