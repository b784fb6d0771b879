import os

import pytest

from qtrain.data.sources import JsonLinesSource, ParquetSource, TextFilesSource
from qtrain.data.sources.base import matching_files


def test_a_fingerprint_sees_bytes_names_and_how_they_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.txt").write_text("three")
    first = TextFilesSource(tmp_path).fingerprint()
    assert TextFilesSource(tmp_path).fingerprint() == first
    assert TextFilesSource(tmp_path, separator="\n\n").fingerprint() != first
    stamp = (tmp_path / "a.txt").stat()
    (tmp_path / "a.txt").write_text("one\n\nTWO")
    os.utime(tmp_path / "a.txt", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size, same time
    changed = TextFilesSource(tmp_path).fingerprint()
    assert changed != first
    (tmp_path / "a.txt").rename(tmp_path / "c.txt")
    assert len({first, changed, TextFilesSource(tmp_path).fingerprint()}) == 3


def test_sources_of_one_file_differ_by_kind(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    found = {
        cls(tmp_path / "a.jsonl").fingerprint() for cls in (TextFilesSource, JsonLinesSource, ParquetSource)
    }
    assert len(found) == 3


def test_folders_by_suffix_and_patterns(tmp_path):
    for name in ("a.jsonl", "b/c.jsonl.gz", "b/d.json", "b/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    suffixes = (".jsonl", ".jsonl.gz")
    assert [i for i, _ in matching_files([tmp_path], suffixes, "x")] == ["a.jsonl", "b/c.jsonl.gz"]
    assert [i for i, _ in matching_files([f"{tmp_path}/b/*.json"], suffixes, "x")] == ["d.json"]
    with pytest.raises(FileNotFoundError, match=r"no file matches .*none.*\.jsonl or \.jsonl\.gz.*'ex\*'"):
        matching_files([tmp_path / "none"], suffixes, "ex*")
