"""What a killed writer leaves is removed; what a living one has is never touched."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qtrain.data import partial_folders
from qtrain.data.partial_folders import partial_folder, remove_stale

HERE = ("0b-boot", "this-host")
THIS_MACHINE = partial_folders._machine


@pytest.fixture(autouse=True)
def _machine(monkeypatch):
    monkeypatch.setattr(partial_folders, "_machine", lambda: HERE)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def left_by(folder: Path, machine: str | None, name: str = ".d.abcdefgh") -> None:
    """What a writer leaves that was killed on ``machine``; None: it died before it wrote down which."""
    (folder / f"{name}.partial").mkdir()
    (folder / f"{name}.partial" / "train-00000.bin").write_bytes(b"half")
    (folder / f"{name}.lock").write_text(machine or "")


def test_a_folder_and_its_lock_while_it_is_written_and_nothing_afterwards(tmp_path):
    with partial_folder(tmp_path / "d") as partial:
        assert partial.parent == tmp_path
        assert names(tmp_path) == [partial.with_suffix(".lock").name, partial.name]
        (partial / "file").write_text("x")
    assert names(tmp_path) == []


def test_a_renamed_folder_stays(tmp_path):
    with partial_folder(tmp_path / "d") as partial:
        (partial / "file").write_text("x")
        partial.rename(tmp_path / "d")
    assert names(tmp_path) == ["d"]
    assert (tmp_path / "d" / "file").read_text() == "x"


def test_an_exception_removes_both(tmp_path):
    def fails():
        with partial_folder(tmp_path / "d") as partial:
            (partial / "file").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert names(tmp_path) == []


WRITER = textwrap.dedent("""
    import sys
    from pathlib import Path
    from qtrain.data import partial_folders
    partial_folders._machine = lambda: ("0b-boot", "this-host")
    with partial_folders.partial_folder(Path(sys.argv[1])) as partial:
        (partial / "train-00000.bin").write_bytes(b"half")
        print(partial, flush=True)
        sys.stdin.readline()
""")


def test_only_a_killed_writer_s_folder_is_removed(tmp_path):
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", WRITER, str(tmp_path / "d")]
    writers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    dead, living = (Path(writer.stdout.readline().strip()) for writer in writers)
    assert remove_stale(tmp_path / "d") == []
    writers[0].send_signal(signal.SIGKILL)
    writers[0].communicate()
    assert remove_stale(tmp_path / "d") == [dead]
    assert names(tmp_path) == [living.with_suffix(".lock").name, living.name]
    assert names(living) == ["train-00000.bin"]
    assert writers[1].communicate("go on\n")[0] == ""
    assert writers[1].returncode == 0
    assert names(tmp_path) == []


def test_a_writer_of_this_very_process_is_alive(tmp_path):
    with partial_folder(tmp_path / "d") as partial:
        assert remove_stale(tmp_path / "d") == []
        assert partial.is_dir()


@pytest.mark.parametrize(
    ("machine", "removed"),
    [
        ("0b-boot this-host", True),
        ("0b-boot a-container", True),
        ("an-older-boot this-host", True),
        ("another-boot another-host", False),
        ("- -", False),
        ("0b-boot", False),
        (None, False),
    ],
)
def test_only_this_machine_s_locks_say_anything(tmp_path, machine, removed):
    left_by(tmp_path, machine)
    assert bool(remove_stale(tmp_path / "d")) == removed
    assert len(names(tmp_path)) == (0 if removed else 2)


def test_unknown_names_equal_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(partial_folders, "_machine", lambda: ("-", "-"))
    left_by(tmp_path, "- -")
    assert remove_stale(tmp_path / "d") == []


def test_only_the_same_target_s(tmp_path):
    for name in (".d.x.abcdefgh", ".dd.abcdefgh", ".x.d.abcdefgh"):
        left_by(tmp_path, " ".join(HERE), name)
    before = names(tmp_path)
    assert remove_stale(tmp_path / "d") == []
    assert names(tmp_path) == before
    assert [p.name for p in remove_stale(tmp_path / "d.x")] == [".d.x.abcdefgh.partial"]


def test_a_folder_without_a_lock_is_left_alone(tmp_path):
    left_by(tmp_path, " ".join(HERE))
    (tmp_path / ".d.abcdefgh.lock").unlink()
    assert remove_stale(tmp_path / "d") == []
    assert names(tmp_path) == [".d.abcdefgh.partial"]


def test_a_lock_without_a_folder_goes_whosever_it_was(tmp_path):
    (tmp_path / ".d.abcdefgh.lock").write_text("another-boot another-host")
    assert remove_stale(tmp_path / "d") == []
    assert names(tmp_path) == []


def test_no_place_no_error(tmp_path):
    assert remove_stale(tmp_path / "nowhere" / "d") == []


def test_a_lock_taken_away_before_it_was_held_is_replaced(tmp_path, monkeypatch):
    """Another process found the new lock file free, and removed it."""
    flock, calls = fcntl.flock, []

    def slow(handle, how):
        if not calls:
            (lock,) = tmp_path.glob("*.lock")
            lock.unlink()
        calls.append(how)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with partial_folder(tmp_path / "d") as partial:
        assert len(calls) == 2
        assert names(tmp_path) == [partial.with_suffix(".lock").name, partial.name]
        monkeypatch.setattr(fcntl, "flock", flock)
        assert remove_stale(tmp_path / "d") == []


def test_a_lock_that_became_another_s_meanwhile_is_left(tmp_path, monkeypatch):
    """The file was opened, then its writer finished and a new one took the same name."""
    left_by(tmp_path, " ".join(HERE))
    flock, lock = fcntl.flock, tmp_path / ".d.abcdefgh.lock"

    def slow(handle, how):
        flock(handle, how)
        lock.unlink()
        lock.write_text(" ".join(HERE))

    monkeypatch.setattr(fcntl, "flock", slow)
    assert remove_stale(tmp_path / "d") == []
    assert len(names(tmp_path)) == 2


def test_where_nothing_can_be_locked_nothing_is_removed(tmp_path, monkeypatch):
    def unsupported(handle, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with partial_folder(tmp_path / "d") as partial:
        assert partial.is_dir()
        assert remove_stale(tmp_path / "d") == []
        assert partial.is_dir()
    assert names(tmp_path) == []


def test_another_error_of_the_lock_is_raised_and_leaves_nothing(tmp_path, monkeypatch):
    def broken(handle, how):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output"), partial_folder(tmp_path / "d"):
        pass
    assert names(tmp_path) == []


def test_the_machine_is_its_boot_and_its_host():
    boot, host = THIS_MACHINE()
    assert host == os.uname().nodename
    path = Path("/proc/sys/kernel/random/boot_id")
    assert boot == (path.read_text().strip() if path.exists() else "-")
    assert THIS_MACHINE() == (boot, host)
