"""A cluster for the tests of this folder, made when the first asks for it: one a process of pytest, each on ports of its own."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))  # same_run

import slurm_daemons


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
