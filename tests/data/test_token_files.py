"""Files written here by the formats' published layouts, with numpy and struct alone."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from qtrain.data.checked_file import ShardError
from qtrain.data.token_files import TokenFiles
from qtrain.data.token_formats import read_layout

IDS = np.random.default_rng(0).integers(0, 257, size=5003)


def write_nanogpt(path: Path, ids, dtype="<u2") -> Path:
    path.write_bytes(np.asarray(ids).astype(dtype).tobytes())
    return path


def write_llmc(path: Path, ids, magic=20240520, version=1, dtype="<u2", tokens=None) -> Path:
    header = [magic, version, len(ids) if tokens is None else tokens] + [0] * 253
    path.write_bytes(struct.pack("<256i", *header) + np.asarray(ids).astype(dtype).tobytes())
    return path


def write_megatron(prefix: Path, sequences, documents, code=8, dtype="<u2", order=None, modes=b"") -> Path:
    """order: the order in which the sequences lie in the .bin."""
    order = list(range(len(sequences))) if order is None else order
    pointers, data = [0] * len(sequences), b""
    for i in order:
        pointers[i] = len(data)
        data += np.asarray(sequences[i]).astype(dtype).tobytes()
    prefix.with_name(prefix.name + ".bin").write_bytes(data)
    n, m = len(sequences), len(documents)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, n, m)
    index += struct.pack(f"<{n}i", *map(len, sequences)) + struct.pack(f"<{n}q", *pointers)
    index += struct.pack(f"<{m}q", *documents) + modes
    prefix.with_name(prefix.name + ".idx").write_bytes(index)
    return prefix


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.setenv("QTRAIN_CACHE", str(tmp_path / "cache"))

    def make(train, val=None, **more):
        more = {"vocab_size": 257, "val_fraction": 0.1, **more}
        return TokenFiles(str(train), None if val is None else str(val), **more)

    return make


def tokens_of(corpus):
    return [split.read(0, len(split)).tolist() for split in (corpus.train, corpus.val)]


@pytest.mark.parametrize("kind", ["auto", "nanogpt"])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_nanogpt_is_read_as_it_was_written(plan, tmp_path, kind, dtype):
    train = write_nanogpt(tmp_path / "train.bin", IDS, dtype)
    val = write_nanogpt(tmp_path / "val.bin", IDS[:99], dtype)
    corpus = plan(train, val, kind=kind, dtype=dtype).open()
    assert tokens_of(corpus) == [IDS.tolist(), IDS[:99].tolist()]
    assert corpus.train.read(17, 40).tolist() == IDS[17:40].tolist()
    assert corpus.identity()["shards"].startswith("nanogpt-")


@pytest.mark.parametrize("header", [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
def test_shards_of_llmc_are_one_array_in_sorted_order(plan, tmp_path, header):
    magic, version, dtype = header
    for i, (a, b) in enumerate([(0, 700), (700, 701), (701, 5003)]):
        write_llmc(tmp_path / f"fw_train_{i:06d}.bin", IDS[a:b], magic, version, dtype)
    write_llmc(tmp_path / "fw_val_000000.bin", IDS[::-1][:100], magic, version, dtype)
    corpus = plan(tmp_path / "*_train_*.bin", tmp_path / "*_val_*.bin").open()
    assert tokens_of(corpus) == [IDS.tolist(), IDS[::-1][:100].tolist()]
    assert corpus.train.read(690, 705).tolist() == IDS[690:705].tolist()


@pytest.mark.parametrize(("code", "dtype"), [(1, "<u1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
@pytest.mark.parametrize("order", [None, [2, 0, 1, 4, 3]])
@pytest.mark.parametrize("modes", [b"", b"\0" * 5])
def test_megatron_is_read_by_its_index(plan, tmp_path, code, dtype, order, modes):
    sequences = [IDS[:1000] % 251, IDS[1000:1003] % 251, [], IDS[1003:3000] % 251, IDS[3000:] % 251]
    prefix = write_megatron(tmp_path / "c", sequences, [0, 2, 4, 5], code, dtype, order, modes)
    corpus = plan(prefix).open()
    whole = np.concatenate(sequences).astype(int).tolist()
    # documents begin at tokens 0, 1003 and 3000; a tenth of 5003 is nearest to the last of them
    assert tokens_of(corpus) == [whole[:3000], whole[3000:]]


def test_the_tail_is_held_out_where_no_validation_file_is_given(plan, tmp_path):
    corpus = plan(write_nanogpt(tmp_path / "t.bin", IDS)).open()
    assert tokens_of(corpus) == [IDS[:4503].tolist(), IDS[4503:].tolist()]


def _cut(path: Path, bytes_less: int) -> None:
    os.truncate(path, path.stat().st_size - bytes_less)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: _cut(write_nanogpt(d / "t.bin", IDS), 1), "no multiple of 2"),
        (lambda d: write_nanogpt(d / "t.bin", []), "holds no tokens"),
        (lambda d: write_nanogpt(d / "t.bin", [*IDS, 257]), r"id 257, outside the vocabulary \[0, 257\)"),
        (lambda d: _cut(write_llmc(d / "t.bin", IDS), 2), "header says 5003 tokens"),
        (lambda d: write_llmc(d / "t.bin", IDS, tokens=5002), "header says 5002 tokens"),
        (lambda d: write_llmc(d / "t.bin", IDS, version=2), "magic 20240520 version 2"),
        (lambda d: write_llmc(d / "t.bin", []), "holds no tokens"),
        (lambda d: _cut(write_llmc(d / "t.bin", IDS), 5003 * 2 + 4), "less than llm.c's header"),
        (lambda d: _cut(write_megatron(d / "t", [IDS], [0, 1]).with_name("t.bin"), 2), "up to byte 10006"),
        (lambda d: _cut(write_megatron(d / "t", [IDS], [0, 1]).with_name("t.idx"), 1), "it was cut"),
        (lambda d: write_megatron(d / "t", [IDS], [0, 1], code=6), "code 6 is no dtype"),
        (lambda d: write_megatron(d / "t", [IDS], [0, 2]), "document marks"),
        (lambda d: write_megatron(d / "t", [IDS], [0, 1]), "holds one document"),
        (lambda d: write_megatron(d / "t", [IDS - 1], [0, 1], 4, "<i4"), "id -1, outside"),
        (lambda d: write_megatron(d / "t", [], [0]), "empty"),
        (lambda d: (write_nanogpt(d / "t.bin", IDS), (d / "t.idx").write_bytes(b"MMIDIDX\x01")), "does not begin"),
        (lambda d: None, "no token file matches"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said(plan, tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ShardError, match=message):
        plan(tmp_path / "t.bin").open()


@pytest.mark.parametrize(
    ("kind", "message"), [("nanogpt", "its kind is llmc"), ("megatron", "its kind is llmc")]
)
def test_a_named_kind_is_held_to(tmp_path, kind, message):
    with pytest.raises(ShardError, match=message):
        read_layout(write_llmc(tmp_path / "t.bin", IDS), kind)


def test_a_wrong_magic_is_no_llmc_file(tmp_path):
    with pytest.raises(ShardError, match="magic 20240521 version 1"):
        read_layout(write_llmc(tmp_path / "t.bin", IDS, magic=20240521), "llmc")


def test_ids_are_checked_by_a_sample_where_that_is_asked_for(plan, tmp_path):
    bad = IDS.copy()
    bad[-1] = 300
    with pytest.raises(ShardError, match="id 300"):
        plan(write_nanogpt(tmp_path / "t.bin", bad), verify="size").open()


def test_an_id_that_the_sample_missed_is_met_by_the_read(plan, tmp_path):
    bad = np.zeros(4_000_000, dtype=int)
    bad[4097] = 300
    corpus = plan(write_nanogpt(tmp_path / "t.bin", bad), verify="size").open()
    with pytest.raises(ShardError, match="holds the id 300 in tokens"):
        corpus.train.read(4000, 4100)


def test_the_check_is_kept_until_the_file_changes(plan, tmp_path, monkeypatch):
    path = write_nanogpt(tmp_path / "t.bin", IDS)
    later = path.stat().st_ctime_ns + 3_000_000_000
    monkeypatch.setattr("time.time_ns", lambda: later)
    first = plan(path).open().identity()
    (kept,) = (tmp_path / "cache" / "token-files").iterdir()
    record = json.loads(kept.read_text())
    kept.write_text(json.dumps({**record, "facts": {**record["facts"], "sha256": "0" * 64}}))
    assert plan(path).open().identity() != first  # from the cache, which lies
    os.utime(path)
    assert plan(path).open().identity() == first


def test_the_identity_is_that_of_the_bytes(plan, tmp_path):
    one = plan(write_nanogpt(tmp_path / "a.bin", IDS)).open().identity()
    assert plan(write_nanogpt(tmp_path / "b.bin", IDS)).open().identity() == one
    changed = IDS.copy()
    changed[3] = (changed[3] + 1) % 257
    other = plan(write_nanogpt(tmp_path / "c.bin", changed)).open().identity()
    assert other["shards"] != one["shards"]
    with pytest.raises(ValueError, match=f"trained on {one['shards']}"):
        plan(tmp_path / "c.bin").open(one)
    assert plan(tmp_path / "a.bin", val_fraction=0.2).open().identity()["shards"] != one["shards"]


@pytest.mark.parametrize("verify", ["sha256", "size"])
def test_an_alteration_under_a_run_is_found(plan, tmp_path, verify):
    path = write_nanogpt(tmp_path / "t.bin", IDS)
    corpus = plan(path, verify=verify).open()
    corpus.check_unchanged()
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"\x01\x00\x02\x00")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))
    with pytest.raises(ShardError, match=r"t\.bin was altered while the run read it; bring the original"):
        corpus.check_unchanged()


def test_a_truncation_under_a_run_is_an_error(plan, tmp_path):
    path = write_llmc(tmp_path / "t.bin", IDS)
    corpus = plan(path).open()
    _cut(path, 2000)
    with pytest.raises(ShardError, match="ends early"):
        corpus.val.read(0, len(corpus.val))


def test_windows_are_those_of_the_array(plan, tmp_path):
    corpus = plan(write_llmc(tmp_path / "t.bin", IDS)).open()
    windows = pickle.loads(pickle.dumps(corpus.train_windows(32, 5)))
    for i in (0, 1, 77, 400):
        start = windows.start(i)
        assert windows[i]["input"].tolist() == IDS[start : start + 32].tolist()
        assert windows[i]["target"].tolist() == IDS[start + 1 : start + 33].tolist()


def test_bits_per_byte_need_the_tokenizer(plan, tmp_path):
    text = "naïve café ☕ " * 50
    ids = [*text.encode(), 256] * 3
    path = write_nanogpt(tmp_path / "t.bin", ids)
    assert plan(path, path).open().validation(16, None).tokens_per_byte is None
    found = plan(path, path, tokenizer="byte", vocab_size=None).open().validation(16, None).tokens_per_byte
    assert found == pytest.approx(len(ids) / (3 * len(text.encode())), rel=1e-12)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"kind": "npy"}, "kind='npy': allowed are auto, nanogpt, llmc, megatron"),
        ({"vocab_size": None}, "data.vocab_size"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"verify": "no"}, "verify='no'"),
        ({"val_fraction": 1.0}, "val_fraction"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_read(plan, more, message):
    with pytest.raises(ValueError, match=message):
        plan("nowhere.bin", **more)
