"""A cluster for the tests of this folder, made when the first asks for it: one a process of pytest, each on ports of its own."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))  # same_run

import slurm_daemons

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def slurm() -> Iterator[slurm_daemons.Slurm]:
    if (reason := slurm_daemons.why_not()) is not None:
        pytest.skip(reason)
    root = Path(
        tempfile.mkdtemp(prefix="qtrain-slurm-", dir="/tmp")
    )  # a socket's path has 108 characters at most
    try:
        with slurm_daemons.running(root) as cluster:
            yield cluster
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster(slurm: slurm_daemons.Slurm) -> slurm_daemons.Slurm:
    """The cluster, for jobs that find this Python, this checkout and each other: its nodes' names are no addresses."""
    path = f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}"
    more = {"PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    more["PATH"] = f"{Path(sys.executable).parent}:{slurm.environment['PATH']}"
    return slurm_daemons.Slurm(slurm.root, {**slurm.environment, **more}, slurm.daemons)
