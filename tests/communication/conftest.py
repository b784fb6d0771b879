"""Real processes on gloo, once for all tests of this folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # ``communicating``, which the processes run


@pytest.fixture(scope="session")
def seen(tmp_path_factory) -> dict[int, list[dict[str, Any]]]:
    """{number of processes: what each of them saw}."""
    folder = tmp_path_factory.mktemp("communicating")
    script = Path(__file__).with_name("communicating.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {w: [torch.load(folder / f"{w}-{r}.pt") for r in range(w)] for w in (2, 4)}
