"""A folder of shards is published whole or not at all: exceptions, full disks and kills included."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from qtrain.data.shard_writer import ShardWriteError, write_shards, writing
from qtrain.data.shards import TokenShards
from qtrain.data.tokenizers import ByteTokenizer


def build(directory, tokenizer=None, shard_tokens=1 << 20):
    with write_shards(
        directory,
        tokenizer or ByteTokenizer(),
        source={"name": "x"},
        settings={"s": 1},
        shard_tokens=shard_tokens,
    ) as writer:
        for text in ("hello", "", "wörld"):
            writer.append("train", text)
        writer.append("val", "validation")
    return directory


def test_manifest_says_everything(tmp_path):
    manifest = TokenShards.open(build(tmp_path / "d", shard_tokens=10)).manifest
    assert manifest.format_version == 2
    assert manifest.tokenizer == ByteTokenizer().about
    assert manifest.dtype == "uint16"
    assert manifest.source == {"name": "x"}
    assert manifest.settings == {"s": 1}
    assert [s.file for s in manifest.splits["train"].shards] == ["train-00000.bin", "train-00001.bin"]
    assert [s.tokens for s in manifest.splits["train"].shards] == [10, 4]
    assert (tmp_path / "d/train-00000.bin").stat().st_size == 20
    first = np.fromfile(tmp_path / "d/train-00000.bin", dtype="<u2")
    assert first[:6].tolist() == [*b"hello", 256]


def test_ids_outside_the_vocabulary_never_wrap(tmp_path):
    class Lying(ByteTokenizer):
        def __init__(self):
            super().__init__()
            self.vocab_size = 200

        def encode_batch(self, texts):
            return [np.array([ord(c) for c in text], dtype=np.int64) for text in texts]

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
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".lock", ".partial"]
    assert TokenShards.open(build(tmp_path / "d")).train.info.documents == 3
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


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
    with pytest.raises(ShardWriteError, match=r"/d: Directory not empty.*move away what lies in its place"):
        build(tmp_path / "d")
    assert (tmp_path / "d/precious.txt").read_text() == "mine"


def test_everything_is_on_the_disk_before_it_is_published(tmp_path, monkeypatch):
    calls, fsync, rename = [], os.fsync, os.rename

    def synced(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        calls.append(os.path.basename(path) + ("/" if os.path.isdir(path) else ""))
        fsync(handle)

    def renamed(old, new):
        calls.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    build(tmp_path / "d", shard_tokens=10)
    at = len(calls) - 1 - calls[::-1].index("rename")
    before = [name for name in calls[:at] if not name.startswith(".") and name != "rename"]
    shards = [f"{split}-{i:05d}.bin" for split in ("train", "val") for i in range(2)]
    assert sorted(before) == ["about.json", "manifest.json", *shards]
    assert calls[at - 1].endswith(".partial/")
    assert calls[at + 1 :] == [f"{tmp_path.name}/"]


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        directory = build(tmp_path / "d")
    finally:
        os.umask(before)
    assert directory.stat().st_mode & 0o777 == 0o750


def test_shard_tokens_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="shard_tokens 0"):
        build(tmp_path / "d", shard_tokens=0)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room there"),
        (errno.EDQUOT, "make room there"),
        (errno.EACCES, "make it writable"),
        (errno.EROFS, "make it writable"),
        (errno.EIO, "mend that"),
    ],
)
def test_errors_of_the_system_name_the_place_and_the_remedy(tmp_path, number, remedy):
    def fail(filename=None):
        with writing(tmp_path / "d"):
            raise OSError(number, os.strerror(number), filename)

    with pytest.raises(ShardWriteError) as caught:
        fail()
    assert caught.value.errno == number
    text = str(caught.value)
    assert f"cannot write the prepared data {tmp_path / 'd'}: {os.strerror(number)}. Nothing was" in text
    assert (
        f"published; {remedy}, or let prepared data lie elsewhere: data.folder=DIR, or QTRAIN_CACHE=DIR"
        in text
    )
    with pytest.raises(ShardWriteError, match=r"\(at /else/where\)\."):
        fail("/else/where")


def test_errors_of_the_caller_are_the_caller_s(tmp_path):
    """A source that cannot be read is no disk that cannot be written."""

    def fails():
        with write_shards(tmp_path / "d", ByteTokenizer()) as writer:
            writer.append("train", "half")
            raise FileNotFoundError("a text")

    with pytest.raises(FileNotFoundError, match=r"^a text$"):
        fails()
    assert list(tmp_path.iterdir()) == []


def test_a_limit_of_the_system_met_in_the_middle(tmp_path):
    """A real error of write(2), which a buffered file reports late and again when it is closed."""
    code = textwrap.dedent("""
        import resource, sys
        from qtrain.data.shard_writer import write_shards
        from qtrain.data.tokenizers import ByteTokenizer
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with write_shards(sys.argv[1], ByteTokenizer()) as writer:
            for i in range(100):
                writer.append("train", "a line of text " * 100)
    """)
    command = [sys.executable, "-X", "dev", "-c", code, str(tmp_path / "d")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"qtrain.data.shard_writer.ShardWriteError: [Errno {errno.EFBIG}] cannot write")
    assert "ResourceWarning" not in done.stderr  # files left open
    assert "Exception ignored" not in done.stderr
    assert list(tmp_path.iterdir()) == []
