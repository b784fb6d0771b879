import errno
import gc
import json
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from qtrain.data import checked_file
from qtrain.data.shards import ShardError, TokenShards, token_dtype, write_shards
from qtrain.data.tokenizers import ByteTokenizer, Tokenizer


class WideTokenizer(Tokenizer):
    """Every character is its code point: ids beyond 16 bits."""

    kind = "codepoints"

    def __init__(self):
        super().__init__("codepoints", 0x110001, 0x110000)

    def encode_batch(self, texts):
        return [np.array([ord(c) for c in text], dtype=self.dtype) for text in texts]

    def _text(self, ids):
        return "".join(map(chr, ids))

    def files(self):
        return {}

    @classmethod
    def from_files(cls, about, files):
        return cls()


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
    with pytest.raises(ShardError, match="format version 99, this code reads 2"):
        TokenShards.open(directory)
    with pytest.raises(ValueError, match="'md5' is unknown; allowed: 'sha256', 'size'"):
        TokenShards.open(directory, verify="md5")


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


LETTERS = 20_000  # several pages, so that a memory map would die where it is truncated


@pytest.fixture
def running(tmp_path):
    """(opened shards of three train files and one val file, their folder)."""
    with write_shards(tmp_path / "d", ByteTokenizer(), shard_tokens=LETTERS // 2) as writer:
        writer.append("train", "ab" * (LETTERS // 2))
        writer.append("val", "c" * (LETTERS // 4))
    return TokenShards.open(tmp_path / "d"), tmp_path / "d"


@pytest.fixture
def settled(running, monkeypatch):
    """The same, opened long after its files were written, with the paths that are hashed from then on."""
    folder, hashed = running[1], []
    with monkeypatch.context() as later:
        later.setattr(
            time, "time_ns", lambda: int(2e9 + max(p.stat().st_ctime for p in folder.iterdir()) * 1e9)
        )
        shards = TokenShards.open(folder)
    time.sleep(0.02)  # past the tick of a coarse clock
    sha256 = checked_file.CheckedFile._sha256

    def counted(file, handle):
        hashed.append(file.path.name)
        return sha256(file, handle)

    monkeypatch.setattr(checked_file.CheckedFile, "_sha256", counted)
    return shards, folder, hashed


def alter(path, at=6):
    """Another byte in the same file; its length stays."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def test_a_truncated_file_is_an_error_that_says_where(running):
    shards, folder = running
    os.truncate(folder / "train-00001.bin", 10_002)
    assert shards.train.read(0, LETTERS // 2 + 5001)[-1] == ord("a")
    message = (
        rf"{folder}/train-00001\.bin ends early: at byte 10000 it gave 2 of 200 bytes.*truncated.*"
        rf"delete the folder {folder}, let it be prepared again and resume"
    )
    with pytest.raises(ShardError, match=message):
        shards.train.read(LETTERS // 2 + 5000, LETTERS // 2 + 5100)
    with pytest.raises(
        ShardError, match=r"train-00001\.bin was altered while the run read it; go back to a check"
    ):
        shards.check_unchanged()


@pytest.mark.parametrize("at_most", [1, 3, 7000])
def test_interrupted_reads_are_continued(running, monkeypatch, at_most):
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, count, at: pread(handle, min(count, at_most), at))
    found = running[0].train.read(LETTERS // 2 - 7, LETTERS // 2 + 6)
    assert found.tolist() == [*b"bababababababab"[:13]]


def test_a_failing_disk_is_named(running, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(ShardError, match=r"val-00000\.bin cannot be read at byte 20: Input/output error"):
        running[0].val.read(10, 11)


@pytest.mark.parametrize("how", ["replaced", "removed", "folder removed"])
def test_a_run_reads_the_files_that_it_opened(running, how):
    shards, folder = running
    path = folder / "train-00000.bin"
    if how == "replaced":
        other = path.with_name("other")
        other.write_bytes(b"\0" * path.stat().st_size)
        other.replace(path)
    elif how == "removed":
        path.unlink()
    else:
        shutil.rmtree(folder)
    assert shards.train.read(0, 4).tolist() == [*b"abab"]
    shards.check_unchanged()
    with pytest.raises(ShardError, match="prepare again"):
        TokenShards.open(folder)


def test_a_copy_in_another_process_opens_the_same_bytes_or_none(running):
    """What a spawned worker of a loader receives."""
    shards, folder = running
    pickled, path = pickle.dumps(shards.train), folder / "train-00000.bin"
    (folder / "copy").write_bytes(path.read_bytes())
    (folder / "copy").replace(path)
    assert pickle.loads(pickled).read(0, 4).tolist() == [*b"abab"]
    (folder / "other").write_bytes(b"\0" * path.stat().st_size)
    (folder / "other").replace(path)
    copy = pickle.loads(pickled)
    for _ in range(2):  # refused once is refused again
        with pytest.raises(ShardError, match=r"train-00000\.bin was altered"):
            copy.read(0, 4)
    path.unlink()
    with pytest.raises(ShardError, match=r"train-00000\.bin is missing"):
        copy.check_unchanged()


def test_forked_processes_share_descriptors_without_disturbing_each_other(running):
    shards, folder = running
    shutil.rmtree(folder)
    child = os.fork()
    if child == 0:
        same = all(shards.train.read(i, i + 3).tolist() == [*b"aba"] for i in range(0, 2000, 2))
        os._exit(0 if same else 1)
    assert all(shards.train.read(i, i + 3).tolist() == [*b"bab"] for i in range(1, 2000, 2))
    assert os.waitpid(child, 0)[1] == 0


def test_descriptors_are_closed_with_the_object(running):
    _, folder = running

    def opened():
        gc.collect()
        links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
        return sum(os.path.realpath(link).startswith(str(folder)) for link in links)

    before = opened()
    shards = TokenShards.open(folder)
    assert opened() == before + 4
    del shards
    assert opened() == before
    alter(folder / "val-00000.bin")
    with pytest.raises(ShardError):
        TokenShards.open(folder)
    assert opened() == before


def test_too_many_open_files_is_explained(running, monkeypatch):
    def fails(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", fails)
    with pytest.raises(ShardError, match=r"Too many open files; allow more open files \(ulimit -n\)"):
        TokenShards.open(running[1])


def test_unchanged_files_are_not_read_again(settled):
    shards, _, hashed = settled
    shards.check_unchanged()
    shards.train.read(0, 10)
    shards.check_unchanged()
    assert hashed == []


@pytest.mark.parametrize("when", [0, 10**9, 4 * 10**9])
def test_a_touch_or_a_copy_in_place_costs_one_hash(settled, when):
    """Whatever the clock says: long ago, or in a year that has not come."""
    shards, folder, hashed = settled
    os.utime(folder / "train-00001.bin", (when, when))
    data = (folder / "val-00000.bin").read_bytes()
    with (folder / "val-00000.bin").open("r+b") as file:
        file.write(data)
    shards.check_unchanged()
    assert hashed == ["train-00001.bin", "val-00000.bin"]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("clock_s", [-(10**8), -1, 0, 10**8])
def test_an_altered_byte_is_found_whatever_the_clock_says(running, monkeypatch, split, clock_s):
    folder, now = running[1], time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + clock_s * 10**9)
    shards = TokenShards.open(folder)
    path = folder / f"{split}-00000.bin"
    before = path.stat()
    time.sleep(0.02)  # past the tick of a coarse clock
    alter(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    other = {"train": "val", "val": "train"}[split]
    getattr(shards, other).check_unchanged()
    for check in (getattr(shards, split), shards):
        with pytest.raises(
            ShardError, match=rf"{path} was altered while the run read it; go back to a checkpoint"
        ):
            check.check_unchanged()
    alter(path)  # undone: the bytes are those of the manifest again
    shards.check_unchanged()


def test_a_change_within_one_tick_of_a_coarse_clock_is_found(running, monkeypatch):
    """The file was written just before it was opened, and altered so soon that its times stayed."""
    folder, fstat = running[1], os.fstat
    stats = {}
    monkeypatch.setattr(os, "fstat", lambda handle: stats.setdefault(handle, fstat(handle)))
    shards = TokenShards.open(folder)
    alter(folder / "train-00002.bin", at=0)
    with pytest.raises(ShardError, match=r"train-00002\.bin was altered"):
        shards.check_unchanged()


def test_a_longer_file_was_altered(settled):
    shards, folder, hashed = settled
    with (folder / "train-00002.bin").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ShardError, match=r"train-00002\.bin was altered"):
        shards.train.check_unchanged()
    assert hashed == []


def test_data_opened_by_size_are_checked_by_their_bytes(running):
    _, folder = running
    shards = TokenShards.open(folder, verify="size")
    shards.check_unchanged()
    alter(folder / "train-00000.bin")
    with pytest.raises(ShardError, match="was altered while"):
        shards.check_unchanged()


def test_ids_outside_the_vocabulary_are_named_when_they_are_read(tmp_path):
    """What an altered file gives before anybody has looked at its sum."""
    directory = build(tmp_path / "d")
    shards = TokenShards.open(directory)
    with (directory / "train-00000.bin").open("r+b") as file:
        file.seek(4)
        file.write(b"\x01\x01")  # 257: the first id that is none
    assert shards.train.read(0, 2).tolist() == [ord("h"), ord("e")]
    with pytest.raises(
        ShardError, match=r"holds the id 257 in tokens \[1, 4\), outside its vocabulary of 257"
    ):
        shards.train.read(1, 4)
