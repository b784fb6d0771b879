import os

import pytest

from qtrain.data import file_stamps
from qtrain.data.file_stamps import FileStamp


def stamp(path):
    with path.open("rb") as file:
        return FileStamp.of(file.fileno())


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"text")
    return path


def test_any_change_shows(file, monkeypatch):
    monkeypatch.setattr(file_stamps, "_TICK_NS", -1)
    before = stamp(file)
    assert before.shows(stamp(file))
    times = file.stat()
    file.write_bytes(b"TEXT")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not before.shows(stamp(file))
    assert before == FileStamp(*before.as_list())


def test_a_young_stamp_shows_nothing(file):
    young = stamp(file)
    assert not young.settled
    assert not young.shows(stamp(file))
