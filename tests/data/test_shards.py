import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from qtrain.data.shards import ShardError, TokenShards, token_dtype, write_shards
from qtrain.data.tokenizers import ByteTokenizer


class WideTokenizer:
    """Every character is its code point: ids beyond 16 bits."""

    name = "codepoints"
    vocab_size = 0x110001
    eot_token = 0x110000

    def encode(self, text):
        return np.array([ord(c) for c in text], dtype=np.int64)

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i != self.eot_token)


TRAIN, VAL = ["hello", "", "wörld"], ["validation"]


def build(directory, tokenizer=None, shard_tokens=1 << 20):
    with write_shards(
        directory,
        tokenizer or ByteTokenizer(),
        source={"name": "x"},
        settings={"s": 1},
        shard_tokens=shard_tokens,
    ) as writer:
        for text in TRAIN:
            writer.append("train", text)
        for text in VAL:
            writer.append("val", text)
    return directory


def expected(tokenizer, texts):
    return [i for text in texts for i in [*tokenizer.encode(text).tolist(), tokenizer.eot_token]]


@pytest.mark.parametrize("shard_tokens", [1, 4, 5, 1 << 20])
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), WideTokenizer()], ids=lambda t: t.name)
def test_round_trip_over_any_number_of_shards(tmp_path, tokenizer, shard_tokens):
    shards = TokenShards.open(build(tmp_path / "d", tokenizer, shard_tokens))
    for split, texts in ((shards.train, TRAIN), (shards.val, VAL)):
        want = expected(tokenizer, texts)
        assert len(split) == len(want)
        for start in range(len(want) + 1):
            for stop in range(start, len(want) + 1):
                assert split.read(start, stop).tolist() == want[start:stop]
        assert split.info.documents == len(texts)
        assert split.info.text_bytes == sum(len(t.encode()) for t in texts)
        assert split.tokens_per_byte == len(want) / split.info.text_bytes
    assert shards.train.dtype == token_dtype(tokenizer.vocab_size)
    assert shards.manifest.vocab_size == tokenizer.vocab_size


def test_manifest_says_everything(tmp_path):
    manifest = TokenShards.open(build(tmp_path / "d", shard_tokens=10)).manifest
    assert manifest.format_version == 1
    assert manifest.tokenizer == {"name": "byte", "vocab_size": 257, "eot_token": 256}
    assert manifest.dtype == "uint16"
    assert manifest.source == {"name": "x"}
    assert manifest.settings == {"s": 1}
    assert [s.file for s in manifest.splits["train"].shards] == ["train-00000.bin", "train-00001.bin"]
    assert [s.tokens for s in manifest.splits["train"].shards] == [10, 4]
    assert (tmp_path / "d/train-00000.bin").stat().st_size == 20
    first = np.fromfile(tmp_path / "d/train-00000.bin", dtype="<u2")
    assert first[:6].tolist() == [*b"hello", 256]


def test_dtype_boundary():
    assert token_dtype(65536) == np.dtype("<u2")
    assert token_dtype(65537) == np.dtype("<u4")


@pytest.mark.parametrize("bounds", [(-1, 2), (3, 2), (0, 15), (20, 21)])
def test_reading_outside_raises(tmp_path, bounds):
    shards = TokenShards.open(build(tmp_path / "d"))
    with pytest.raises(IndexError, match="outside split 'train' of 14 tokens"):
        shards.train.read(*bounds)


def test_reads_are_copies(tmp_path):
    split = TokenShards.open(build(tmp_path / "d")).train
    split.read(0, 3)[:] = 0
    assert split.read(0, 3).tolist() == [*b"hel"]


def test_an_altered_byte_is_refused_by_name(tmp_path):
    directory = build(tmp_path / "d")
    path = directory / "val-00000.bin"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(
        ShardError, match=r"val-00000\.bin was altered.*delete the folder .*d and prepare again"
    ):
        TokenShards.open(directory)
    assert TokenShards.open(directory, verify="size").val.info.tokens == 11


@pytest.mark.parametrize("verify", ["sha256", "size"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_truncated_or_missing_shard_is_always_refused(tmp_path, verify, damage):
    directory = build(tmp_path / "d")
    path = directory / "train-00000.bin"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ShardError, match=r"train-00000\.bin is (26 bytes long|missing).*28 bytes.*delete"):
        TokenShards.open(directory, verify=verify)


def test_broken_manifests_are_refused(tmp_path):
    with pytest.raises(ShardError, match=r"holds no manifest\.json.*prepare again"):
        TokenShards.open(tmp_path)
    directory = build(tmp_path / "d")
    path = directory / "manifest.json"
    good = json.loads(path.read_text())
    for bad in ("{", "[]", json.dumps({**good, "splits": {}}), json.dumps({**good, "splits": {"train": 3}})):
        path.write_text(bad)
        with pytest.raises(ShardError, match="delete the folder"):
            TokenShards.open(directory)
    path.write_text(json.dumps({**good, "format_version": 99}))
    with pytest.raises(ShardError, match="format version 99, this code reads 1"):
        TokenShards.open(directory)
    with pytest.raises(ValueError, match="'md5' is unknown; allowed: 'sha256', 'size'"):
        TokenShards.open(directory, verify="md5")


def test_ids_outside_the_vocabulary_never_wrap(tmp_path):
    class Lying(WideTokenizer):
        vocab_size = 200
        eot_token = 199

    with (
        pytest.raises(ValueError, match=r"ids in \[300, 300\], outside \[0, 200\)"),
        write_shards(tmp_path / "d", Lying()) as writer,
    ):
        writer.append("train", chr(300))
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_nothing(tmp_path):
    def interrupted():
        with write_shards(tmp_path / "d", ByteTokenizer()) as writer:
            writer.append("train", "half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_directory(tmp_path):
    code = textwrap.dedent("""
        import os, signal, sys
        from qtrain.data.shards import write_shards
        from qtrain.data.tokenizers import ByteTokenizer
        with write_shards(sys.argv[1], ByteTokenizer()) as writer:
            writer.append("train", "half of it")
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "d")])
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "d").exists()
    assert TokenShards.open(build(tmp_path / "d")).train.info.documents == 3


def test_whoever_is_second_keeps_the_first(tmp_path):
    with write_shards(tmp_path / "d", ByteTokenizer()) as slow:
        slow.append("train", "slow")
        build(tmp_path / "d")
        inode = os.stat(tmp_path / "d/train-00000.bin").st_ino
    assert os.stat(tmp_path / "d/train-00000.bin").st_ino == inode
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    TokenShards.open(tmp_path / "d")


def test_something_else_in_the_place_is_not_replaced(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/precious.txt").write_text("mine")
    with pytest.raises(OSError, match="not empty"):
        build(tmp_path / "d")
    assert (tmp_path / "d/precious.txt").read_text() == "mine"


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        directory = build(tmp_path / "d")
    finally:
        os.umask(before)
    assert directory.stat().st_mode & 0o777 == 0o750


def test_pickling_carries_paths_not_tokens(tmp_path):
    with write_shards(tmp_path / "d", ByteTokenizer()) as writer:
        writer.append("train", "x" * 100_000)
        writer.append("val", "y")
    split = TokenShards.open(tmp_path / "d").train
    split.read(0, 1)
    pickled = pickle.dumps(split)
    assert len(pickled) < 5000
    assert pickle.loads(pickled).read(99_999, 100_001).tolist() == [ord("x"), 256]


def test_an_empty_split_opens(tmp_path):
    with write_shards(tmp_path / "d", ByteTokenizer()) as writer:
        writer.append("train", "x")
    shards = TokenShards.open(tmp_path / "d")
    assert len(shards.val) == 0
    assert shards.val.read(0, 0).tolist() == []


def test_shard_tokens_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="shard_tokens 0"):
        build(tmp_path / "d", shard_tokens=0)
