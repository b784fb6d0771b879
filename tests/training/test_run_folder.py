"""Whether a run's process lives, seen without touching its lock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qtrain.training.run_folder import LOCK, is_trained, lock_run

HOLDS = "import sys; from pathlib import Path; from qtrain.training.run_folder import lock_run; f = lock_run(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_a_process_that_holds_it_lives_until_it_is_killed(tmp_path: Path, holder) -> None:
    assert is_trained(tmp_path) is True
    with pytest.raises(
        ValueError, match=f"being trained by process {holder.pid} on "
    ):  # and its lock is whole
        lock_run(tmp_path)
    holder.kill()
    assert is_trained(tmp_path) in (True, False)  # a zombie until it is waited for
    holder.wait()
    assert is_trained(tmp_path) is False
    lock_run(tmp_path).close()


def test_a_zombie_trains_nothing(tmp_path: Path, holder) -> None:
    holder.stdin.close()
    holder.stdout.read()  # until it has ended
    for _ in range(100):
        if is_trained(tmp_path) is False:
            return
    raise AssertionError("a process that ended, and was not waited for, counts as living")


def test_another_process_with_its_number_is_not_the_run(tmp_path: Path, holder) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / LOCK).write_text((tmp_path / LOCK).read_text())
    assert is_trained(other) is False


def test_what_cannot_be_seen_from_here(tmp_path: Path) -> None:
    assert is_trained(tmp_path) is None  # no lock
    (tmp_path / LOCK).write_text("process 1 on another-machine\n")
    assert is_trained(tmp_path) is None
    (tmp_path / LOCK).write_text("")  # being written
    assert is_trained(tmp_path) is None
