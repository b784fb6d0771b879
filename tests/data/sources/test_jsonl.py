import gzip
import json
import sys

import pytest

from qtrain.data.sources import Document, JsonLinesSource

TEXTS = ["one", "zwei\r\n\u2028drei", "\U0001f600", ""]


def lines(texts, key="text"):
    return "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)).encode()


def read(source):
    return [document.text for document in source.documents()]


def test_plain_and_gzip_give_the_same_documents(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS) + b"\n  \n" + lines(["last"]).rstrip(b"\n"))
    assert read(JsonLinesSource(tmp_path)) == [*TEXTS, "last"]
    ids = [d.id for d in JsonLinesSource(tmp_path).documents()]
    assert ids == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "a.jsonl:4", "a.jsonl:7"]
    # Two members, as `cat a.gz b.gz` gives them
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(["x"])) + gzip.compress(lines(["y"])))
    assert read(JsonLinesSource(tmp_path / "b.jsonl.gz")) == ["x", "y"]


def test_another_key(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(["x"], "content"))
    assert read(JsonLinesSource(tmp_path, text_key="content")) == ["x"]
    with pytest.raises(
        ValueError, match=r"a\.jsonl:1: no key 'text' \(it has 'id', 'content'\); set text_key"
    ):
        read(JsonLinesSource(tmp_path))
    prints = {JsonLinesSource(tmp_path, text_key=key).fingerprint() for key in ("text", "content")}
    assert len(prints) == 2


BAD = {
    b'{"text": "cut': "no JSON",
    b"[1, 2]": "a JSON list",
    b'{"text": 3}': "'text' holds a int, no text",
    b'{"text": null}': "'text' holds a NoneType",
    b'{"text": "\\ud800"}': "half of a surrogate pair",
    b'{"text": "caf\xe9"}': "no UTF-8",
    b'{"other": 1}': "no key 'text'",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_an_error_with_its_place_or_counted(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(lines(["one"]) + line + b"\n" + lines(["two"]))
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: {BAD[line]}.*bad_lines=skip"):
        read(JsonLinesSource(tmp_path))
    source = JsonLinesSource(tmp_path, bad_lines="skip")
    assert list(source.documents()) == [Document("a.jsonl:1", "one"), Document("a.jsonl:3", "two")]
    assert source.skipped == ("a.jsonl:2",)


@pytest.mark.parametrize("bad_lines", ["error", "skip"])
def test_a_cut_archive_is_an_error_either_way(tmp_path, bad_lines):
    whole = gzip.compress(lines([str(i) * 50 for i in range(200)]))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz:\d+: the compressed file is cut"):
        read(JsonLinesSource(tmp_path, bad_lines=bad_lines))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:40] + b"\0\0\0\0" + whole[44:])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz:\d+: the compressed file is cut or damaged"):
        read(JsonLinesSource(tmp_path, bad_lines=bad_lines))


def test_zstandard_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(
        ImportError, match=r"a\.jsonl\.zst needs the library 'zstandard'.*pip install zstandard"
    ):
        read(JsonLinesSource(tmp_path))


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    compress = zstandard.ZstdCompressor(write_checksum=True).compress
    whole = compress(lines(TEXTS)) + compress(lines(["second frame"]))
    (tmp_path / "a.jsonl.zst").write_bytes(whole)
    assert read(JsonLinesSource(tmp_path)) == [*TEXTS, "second frame"]
    for damaged in (whole[:-5], whole[:20] + b"\0\0\0\0" + whole[24:], compress(lines(["x"]))[:-3]):
        (tmp_path / "a.jsonl.zst").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.jsonl\.zst:\d+: the compressed file is cut or damaged"):
            read(JsonLinesSource(tmp_path, bad_lines="skip"))


def test_what_to_do_with_bad_lines_is_one_of_two():
    with pytest.raises(ValueError, match="bad_lines 'ignore': allowed are error, skip"):
        JsonLinesSource("x", bad_lines="ignore")
