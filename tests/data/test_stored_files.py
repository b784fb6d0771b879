"""Sources read from a real object store what they read from the same files on this disk."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from qtrain.data.object_store import ObjectStore
from qtrain.data.prepare import prepare
from qtrain.data.sources import JsonLinesSource, NoFiles, ParquetSource, SourceError, TextFilesSource
from qtrain.data.tokenizers import ByteTokenizer


@pytest.fixture
def stored(bucket, tmp_path) -> tuple[Path, str]:
    """(folder, address) of the same files: three kinds, some deeper."""
    root = tmp_path / "corpus"
    (root / "deep").mkdir(parents=True)
    texts = [f"document {i}: " + f"naïve cat {i}. " * (3 + i) for i in range(40)]
    (root / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[:20]))
    with gzip.open(root / "deep" / "b.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps({"text": t}) + "\n" for t in texts[20:]))
    for k in range(2):
        pyarrow.parquet.write_table(pa.table({"text": texts[20 * k : 20 * k + 20]}), root / f"{k}.parquet")
    for i, text in enumerate(texts):
        (root / "deep" / f"{i}.txt").write_bytes(text.replace(". ", ".\r\n").encode())
    address = f"{bucket}/corpus"
    for path in root.rglob("*"):
        if path.is_file():
            ObjectStore(address).write_file(path, path.relative_to(root).as_posix())
    return root, address


def listed(source) -> list[tuple[str, str]]:
    return [(d.id, d.text) for d in source.documents()]


@pytest.mark.parametrize("kind", [JsonLinesSource, ParquetSource, TextFilesSource])
def test_the_documents_are_those_of_the_same_files_here(stored, kind):
    root, address = stored
    here = listed(kind(root))
    assert len(here) == 40
    assert listed(kind(address)) == here
    assert listed(kind([f"{address}/"])) == here
    one = prepare(kind(root), ByteTokenizer(), root.parent / "one", val_fraction=0.2)
    other = prepare(kind(address), ByteTokenizer(), root.parent / "other", val_fraction=0.2)
    for a, b in ((one.train, other.train), (one.val, other.val)):
        assert a.read(0, len(a)).tolist() == b.read(0, len(b)).tolist()
    shares = [kind(address).share(part, 3) for part in range(3)]
    assert [d for share in shares for d in listed(share)] == here


def test_files_and_patterns_have_addresses(stored):
    root, address = stored
    assert listed(JsonLinesSource(f"{address}/a.jsonl")) == listed(JsonLinesSource(root / "a.jsonl"))
    assert listed(TextFilesSource(f"{address}/deep/*.txt")) == listed(
        TextFilesSource(str(root / "deep" / "*.txt"))
    )
    both = [f"{address}/a.jsonl", f"{address}/deep/b.jsonl.gz"]
    assert [i for i, _ in listed(JsonLinesSource(both))][::39] == ["a.jsonl:1", "deep/b.jsonl.gz:20"]


def test_what_is_not_there_is_said(stored):
    root, address = stored
    for path in (f"{address}/nothing", f"{address}/*.csv", "s3://no-such-bucket/x"):
        with pytest.raises(NoFiles, match=r"no file matches '"):
            listed(TextFilesSource(path))
    with pytest.raises(ValueError, match="addresses of one kind, or paths of this machine"):
        listed(TextFilesSource([address, str(root)]))


def test_a_changed_object_is_another_fingerprint_without_reading_it(stored, monkeypatch):
    root, address = stored
    source = JsonLinesSource(address)
    monkeypatch.setattr(ObjectStore, "read_range", lambda *_: pytest.fail("it was read"))
    before, stamp = source.fingerprint(), source.stamp()
    assert JsonLinesSource(address).fingerprint() == before
    assert JsonLinesSource(address).stamp() == stamp
    (root / "a.jsonl").write_text((root / "a.jsonl").read_text().replace("cat", "cow", 1))
    ObjectStore(address).write_file(root / "a.jsonl", "a.jsonl")
    assert JsonLinesSource(address).fingerprint() != before
    assert JsonLinesSource(address).stamp() != stamp


def test_an_object_that_is_cut_while_it_is_read_is_no_shorter_text(stored, monkeypatch):
    _, address = stored
    whole = ObjectStore.read_range
    monkeypatch.setattr(
        ObjectStore,
        "read_range",
        lambda self, name, start, stop: whole(self, name, start, stop)[: 50 - start],
    )
    with pytest.raises(SourceError, match=r"a\.jsonl ends at byte 50 of \d+: it was cut"):
        listed(JsonLinesSource(f"{address}/a.jsonl"))


def test_a_store_that_fails_is_read_and_one_that_is_gone_is_named(stored, flaky):
    root, address = stored
    flaky("503")
    assert listed(JsonLinesSource(address)) == listed(JsonLinesSource(root))
    flaky("never", good=2)
    with pytest.raises((SourceError, ValueError), match=r"cannot be (read|reached).*4 attempts in a row"):
        listed(JsonLinesSource(address))
