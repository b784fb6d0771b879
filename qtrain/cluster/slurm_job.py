"""Which job of SLURM a process belongs to, from the variables that SLURM sets for it (sbatch's manual, "output
environment variables")."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class SlurmJob:
    """job: its number, of an array's task a number of its own. array_job, array_task: those of the array, None outside
    of one. restarts: how often SLURM requeued it. nodes: as SLURM writes lists, ``n[0-1]``. partition: None where SLURM
    names none.
    """

    job: str
    array_job: str | None = None
    array_task: int | None = None
    restarts: int = 0
    nodes: str = ""
    partition: str | None = None

    @property
    def name(self) -> str:
        """What ``scontrol`` and ``sacct`` take and ``squeue`` prints: ``120_3``, or ``123`` outside of an array."""
        return self.job if self.array_job is None else f"{self.array_job}_{self.array_task}"

    @classmethod
    def here(cls, environ: Mapping[str, str] = os.environ) -> SlurmJob | None:
        """The job that this process runs in, None outside of one.

        Raises ValueError for variables that SLURM would not set.
        """
        job = environ.get("SLURM_JOB_ID")
        if not job:
            return None
        if not re.fullmatch(r"[0-9]+", job):
            raise ValueError(f"SLURM_JOB_ID={job!r}: SLURM numbers its jobs; unset it outside of a job")
        array_job = environ.get("SLURM_ARRAY_JOB_ID") or None
        return cls(
            job=job,
            array_job=array_job,
            array_task=None if array_job is None else _count(environ, "SLURM_ARRAY_TASK_ID"),
            restarts=_count(environ, "SLURM_RESTART_COUNT", "0"),  # not set in a job's first run
            nodes=environ.get("SLURM_JOB_NODELIST", ""),
            partition=environ.get("SLURM_JOB_PARTITION") or None,
        )


def _count(environ: Mapping[str, str], name: str, default: str = "") -> int:
    value = environ.get(name, default)
    if not re.fullmatch(r"[0-9]+", value):
        raise ValueError(f"{name}={value!r}: SLURM sets a number; unset SLURM_JOB_ID outside of a job")
    return int(value)
