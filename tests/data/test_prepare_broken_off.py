"""A preparation whose disk fails or that is killed, at any moment: nothing lost, nothing half-written."""

import errno
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from qtrain.data.prepare import prepare
from qtrain.data.shard_writer import ShardWriteError
from qtrain.data.sources import TextFilesSource
from qtrain.data.tokenizers import ByteTokenizer

from .folder_contents import contents


@pytest.fixture
def few(tmp_path):
    """A source of a dozen documents, prepared in some hundredths of a second."""
    folder = tmp_path / "few"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02d}.txt").write_text("".join(random.Random(i).choices("abcdefgh ", k=300)))
    return TextFilesSource(folder)


def prepared(few, out):
    return prepare(few, ByteTokenizer(), out, val_fraction=0.3, shard_tokens=1000).directory


class Disk:
    """Counts what is asked of the file system on the way to a prepared folder, and refuses the n-th."""

    def __init__(self, monkeypatch):
        self.count, self.refused = 0, None
        for module, name in (
            (os, "write"),
            (os, "fsync"),
            (os, "mkdir"),
            (os, "rename"),
            (tempfile, "mkstemp"),
        ):
            monkeypatch.setattr(module, name, self.asked(getattr(module, name)))
        disk, real_open = self, Path.open

        class File:
            def __init__(self, file):
                self.file = file
                self.write, self.flush = disk.asked(file.write), disk.asked(file.flush)

            def close(self):
                if not self.file.closed:
                    disk.asked(self.file.close)()

            def fileno(self):
                return self.file.fileno()

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.close()

        def open_(path, mode="r", **more):
            return real_open(path, mode, **more) if "w" not in mode else File(real_open(path, mode, **more))

        monkeypatch.setattr(Path, "open", self.asked(open_, unless_reading=True))

    def asked(self, call, unless_reading=False):
        def counted(*arguments, **more):
            if unless_reading and (len(arguments) < 2 or "w" not in arguments[1]):
                return call(*arguments, **more)
            self.count += 1
            if self.count == self.refused:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*arguments, **more)

        return counted


def test_a_disk_that_is_full_at_any_moment(few, tmp_path, monkeypatch):
    undisturbed = contents(prepared(few, tmp_path / "whole"))
    disk = Disk(monkeypatch)
    prepared(few, tmp_path / "counted")
    asked, published = disk.count, 0
    assert asked > 40
    for refused in range(1, asked + 1):
        out = tmp_path / str(refused)
        disk.count, disk.refused = 0, refused
        with pytest.raises(
            ShardWriteError, match=r"No space left.*make room there, .*data\.folder=.*QTRAIN_CACHE"
        ):
            prepared(few, out)
        # A disk that fails after the rename has published everything
        for directory in out.iterdir() if out.exists() else ():
            assert contents(directory) == undisturbed, refused
            published += 1
        disk.refused = None
        assert contents(prepared(few, out)) == undisturbed
        assert len(list(out.iterdir())) == 1
    assert published == 1


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_cache_folder_that_cannot_be(few, tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("QTRAIN_CACHE", str(tmp_path / place))
    with pytest.raises(
        ShardWriteError, match=rf"cannot write the prepared data {tmp_path / place}/files-.*QTRAIN_CACHE"
    ):
        prepare(few, ByteTokenizer(), val_fraction=0.3)
    assert (tmp_path / "file").read_text() == "no folder"


def run_and_die(few, out, moment, in_writing):
    """Prepares in a forked process that kills itself at its ``moment``-th call or return (of ``in_writing``: those in
    the modules that write). Returns how many there were, None where it died."""
    (report, to_parent) = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            count = 0

            def event(frame, what, _):
                nonlocal count
                if in_writing and not frame.f_code.co_filename.endswith(
                    ("shard_writer.py", "partial_folders.py")
                ):
                    return
                count += 1
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.setprofile(event)
            prepared(few, out)
            sys.setprofile(None)
            os.write(to_parent, str(count).encode())
        finally:
            os._exit(1)
    os.close(to_parent)
    with os.fdopen(report, "rb") as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    return int(said)


@pytest.mark.parametrize(("in_writing", "deaths"), [(True, 24), (False, 10)])
def test_a_writer_killed_at_any_moment(few, tmp_path, in_writing, deaths):
    undisturbed = contents(prepared(few, tmp_path / "whole"))
    moments = run_and_die(few, tmp_path / "counted", None, in_writing)
    assert moments > 300
    draw, leftovers = random.Random(7), 0
    for moment in draw.sample(range(1, moments + 1), deaths):
        out = tmp_path / str(moment)
        assert run_and_die(few, out, moment, in_writing) is None, moment
        found = list(out.iterdir()) if out.exists() else []
        leftovers += any(path.suffix == ".partial" for path in found)
        for path in found:  # what has its final name is complete
            assert path.suffix in (".partial", ".lock") or contents(path) == undisturbed
        assert contents(prepared(few, out)) == undisturbed, moment
        assert len(list(out.iterdir())) == 1, moment
    # The test would prove nothing if all of them died before they began
    assert not in_writing or leftovers > deaths // 2


def test_leftovers_go_also_where_the_data_are_there(few, tmp_path):
    directory = prepared(few, tmp_path / "out")
    (tmp_path / "out" / f".{directory.name}.abcdefgh.lock").write_text("")
    assert prepared(few, tmp_path / "out") == directory
    assert [path.name for path in (tmp_path / "out").iterdir()] == [directory.name]
