import hashlib
import json
import os
import stat

import pytest

from qtrain.data import cache, file_stamps
from qtrain.data.cache import RememberedDigests, cache_root, sha256_of


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("QTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_stamps, "_TICK_NS", -1)  # as if everything were old
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_text(f"text of {path.name}")
    return paths


def digests(paths, read=None):
    def compute(path):
        if read is not None:
            read.append(path.name)
        return sha256_of(path)

    return RememberedDigests(paths).get(compute)


def direct(paths):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_only_what_changed_is_read_again(files):
    read = []
    assert digests(files, read) == direct(files)
    assert digests(files, read) == direct(files)
    assert read == ["a", "b"]
    files[1].write_text("another text")
    assert digests(files, read) == direct(files)
    assert read == ["a", "b", "b"]
    times = files[0].stat()
    files[0].write_text("TEXT of a")  # as long as before, and dated back
    os.utime(files[0], ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digests(files, read) == direct(files)
    assert read == ["a", "b", "b", "a"]


def test_young_files_are_read_again(files, monkeypatch):
    monkeypatch.setattr(file_stamps, "_TICK_NS", 2_000_000_000)
    read = []
    digests(files, read)
    digests(files, read)
    assert read == ["a", "b", "a", "b"]


def test_a_file_written_while_it_is_read_shows(files):
    def compute(path):
        found = sha256_of(path)
        if path.name == "a":
            path.write_text("written meanwhile")
        return found

    RememberedDigests(files).get(compute)
    assert digests(files) == direct(files)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": [[1], "x"]}'])
def test_a_spoiled_memory_is_no_memory(files, content):
    digests(files)
    (memory,) = (cache_root() / "digests").iterdir()
    memory.write_text(content)
    assert digests(files) == direct(files)
    assert json.loads(memory.read_text()).keys() == {str(p) for p in files}


def test_a_memory_that_cannot_be_written_is_none(files, monkeypatch):
    (cache_root()).mkdir()
    (cache_root() / "digests").write_text("a file in its place")
    assert digests(files) == direct(files)
    assert stat.S_ISREG((cache_root() / "digests").stat().st_mode)


def test_a_missing_file_is_an_error(files):
    with pytest.raises(FileNotFoundError):
        digests([*files, files[0].with_name("none")])


def test_the_place(monkeypatch, tmp_path):
    monkeypatch.setenv("QTRAIN_CACHE", "~/x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_root() == tmp_path / "x"
    monkeypatch.delenv("QTRAIN_CACHE")
    assert cache.cache_root() == tmp_path / ".cache" / "qtrain" / "data"
