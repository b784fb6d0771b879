"""Freed memory is kept: a process whose steps allocate and free the same tensors soon touches no fresh pages."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from qtrain.training.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    print(keep_freed_memory())
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    held = [torch.empty(n << 20, dtype=torch.uint8).fill_(1) for n in (1, 20, 100)]
for _ in range(9):  # until the heap has room for its fragments as well
    step()
before = faults()
step()
print(faults() - before)
"""
PAGES = 121 * 256  # of the tensors of a step

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")


def run(mode: str, **environment: str) -> list[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, mode],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_later_steps_touch_no_fresh_pages() -> None:
    kept, faults = run("keep")
    assert kept == "True"
    assert int(faults) < PAGES / 100


def test_without_it_they_do() -> None:
    """Else the test above would show nothing."""
    assert int(run("leave")[0]) > PAGES / 2


def test_the_environment_s_settings_stay() -> None:
    kept, faults = run("keep", MALLOC_MMAP_THRESHOLD_="65536")
    assert kept == "False"
    assert int(faults) > PAGES / 2
