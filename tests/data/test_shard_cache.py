from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from qtrain.data import shard_cache
from qtrain.data.cache import sha256_of
from qtrain.data.checked_file import ShardError
from qtrain.data.manifest import ShardInfo
from qtrain.data.object_store import ObjectStore
from qtrain.data.shard_cache import ShardCache


class Counting(ObjectStore):
    """A store on disk that counts what is read of it."""

    reads = 0

    def read_range(self, name, start, stop):
        type(self).reads += 1
        return super().read_range(name, start, stop)


@pytest.fixture
def store(tmp_path, monkeypatch) -> Counting:
    monkeypatch.setenv("QTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Counting, "reads", 0)
    (tmp_path / "store").mkdir()
    return Counting(f"file://{tmp_path}/store")


@pytest.fixture
def shards(store, tmp_path) -> list[ShardInfo]:
    """Five of 1,000 bytes."""
    found = []
    for i in range(5):
        content = bytes((7 * i + j) % 251 for j in range(1000))
        (tmp_path / "store" / f"{i}.bin").write_bytes(content)
        found.append(ShardInfo(f"{i}.bin", 500, 1000, hashlib.sha256(content).hexdigest()))
    return found


def cache_of(tmp_path: Path, limit: int) -> ShardCache:
    return ShardCache(tmp_path / "fetched", limit)


def here(cache: ShardCache, shards: list[ShardInfo]) -> list[int]:
    return [i for i, info in enumerate(shards) if cache.path(info).is_file()]


def taken(cache: ShardCache, info: ShardInfo, store: ObjectStore) -> None:
    handle = cache.take(info, store)
    assert hashlib.sha256(os.pread(handle, 2000, 0)).hexdigest() == info.sha256
    os.close(handle)


def test_a_shard_is_fetched_once_and_in_blocks(store, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shard_cache, "BLOCK_BYTES", 300)
    cache = cache_of(tmp_path, 10_000)
    for _ in range(3):
        taken(cache, shards[0], store)
    assert Counting.reads == 4
    assert capsys.readouterr().err.count(f"fetched {store.at('0.bin')}: 0.0 MB") == 1
    # Named by its contents: the same shard at another address is here already
    taken(cache, shards[0], ObjectStore(f"file://{tmp_path}/elsewhere"))
    assert not list(cache.folder.glob("*.partial"))


def test_what_was_taken_longest_ago_goes_and_what_is_held_stays(store, shards, tmp_path):
    cache = cache_of(tmp_path, 3000)
    held = cache.take(shards[0], store)
    for info in shards[1:3]:
        taken(cache, info, store)
        time.sleep(0.01)
    taken(cache, shards[1], store)  # now 2 was taken longest ago, after 0, which is held
    taken(cache, shards[3], store)
    assert here(cache, shards) == [0, 1, 3]
    assert os.pread(held, 2000, 0) == (tmp_path / "store" / "0.bin").read_bytes()
    os.close(held)
    time.sleep(0.01)
    taken(cache, shards[4], store)
    assert here(cache, shards) == [1, 3, 4]


def test_what_is_needed_is_fetched_beyond_the_limit_and_what_is_ahead_is_not(store, shards, tmp_path, capsys):
    cache = cache_of(tmp_path, 2000)
    held = [cache.take(info, store) for info in shards[:2]]
    cache.fetch_if_room(shards[2], store)
    assert here(cache, shards) == [0, 1]
    held.append(cache.take(shards[2], store))
    assert here(cache, shards) == [0, 1, 2]
    assert "shards in use fill more than its limit" in capsys.readouterr().err
    for handle in held:
        os.close(handle)
    cache.fetch_if_room(shards[3], store)
    assert len(here(cache, shards)) == 2
    assert 3 in here(cache, shards)


def test_reading_ahead_fetches_in_a_thread_and_its_errors_wait(store, shards, tmp_path):
    cache = cache_of(tmp_path, 10_000)
    (tmp_path / "store" / "1.bin").unlink()
    for info in shards[:3]:
        cache.ahead(info, store)
    deadline = time.monotonic() + 20
    while here(cache, shards) != [0, 2] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert here(cache, shards) == [0, 2]
    with pytest.raises(ShardError, match=r"1\.bin is missing"):
        cache.take(shards[1], store)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda p: p.unlink(),
            r"object file://.*0\.bin is missing, its manifest says 1000 bytes; upload it anew",
        ),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), r"0\.bin is 999 bytes long, its manifest says 1000"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), r"0\.bin is 1001 bytes long"),
        (
            lambda p: p.write_bytes(b"x" + p.read_bytes()[1:]),
            r"0\.bin was altered: its sha256 is .*resume=auto",
        ),
    ],
)
def test_an_object_that_is_not_what_it_was_is_refused_and_not_kept(store, shards, tmp_path, harm, message):
    harm(tmp_path / "store" / "0.bin")
    cache = cache_of(tmp_path, 10_000)
    with pytest.raises(ShardError, match=message):
        cache.take(shards[0], store)
    assert [p.suffix for p in cache.folder.iterdir()] == [".lock"]


def test_an_object_that_is_cut_while_it_is_read_is_refused(store, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "BLOCK_BYTES", 300)
    monkeypatch.setattr(Counting, "size", lambda self, name: 1000)
    (tmp_path / "store" / "0.bin").write_bytes(b"short")
    with pytest.raises(ShardError, match=r"0\.bin was cut while it was read"):
        cache_of(tmp_path, 10_000).take(shards[0], store)


def test_a_child_that_was_forked_during_a_fetch_holds_no_lock(store, shards, tmp_path, monkeypatch):
    cache, children = cache_of(tmp_path, 10_000), []

    def forking(name, start, stop):
        if (child := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
        children.append(child)
        return ObjectStore.read_range(store, name, start, stop)

    monkeypatch.setattr(store, "read_range", forking)
    monkeypatch.setattr(shard_cache, "_by_threads", lambda fetch, starts: map(fetch, starts))
    try:
        taken(cache, shards[0], store)
        with cache._locked(shards[0], wait=False) as lock:
            assert lock >= 0
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_what_arrives_counts_and_what_a_killed_fetch_left_does_not(store, shards, tmp_path):
    cache = cache_of(tmp_path, 2000)
    taken(cache, shards[0], store)
    left = [cache.folder / f".{shards[i].sha256}.1.partial" for i in (1, 2)]
    for path in left:
        path.write_bytes(bytes(1000))
    with cache._locked(shards[1], wait=True):  # as its fetch would
        cache.fetch_if_room(shards[3], store)
        assert [path.is_file() for path in left] == [True, False]
        assert here(cache, shards) == [3]
    cache.fetch_if_room(shards[4], store)
    assert here(cache, shards) == [3, 4]


@pytest.mark.parametrize("harm", [lambda p: p.write_bytes(b"x" * 1000), lambda p: p.write_bytes(b"x")])
def test_a_kept_file_that_was_altered_is_fetched_again(store, shards, tmp_path, harm):
    cache = cache_of(tmp_path, 10_000)
    taken(cache, shards[0], store)
    time.sleep(0.05)  # a tick of the clock that stamps files
    harm(cache.path(shards[0]))
    taken(cache, shards[0], store)
    assert Counting.reads == 2


def test_what_was_checked_is_not_read_again_and_what_was_touched_is(store, shards, tmp_path, monkeypatch):
    cache = cache_of(tmp_path, 10_000)
    taken(cache, shards[0], store)
    hashed = []
    monkeypatch.setattr(shard_cache, "sha256_of", lambda path: hashed.append(path) or sha256_of(path))
    taken(cache, shards[0], store)
    assert hashed == []
    os.utime(cache.path(shards[0]))
    for _ in range(2):
        taken(cache, shards[0], store)
    assert hashed == [cache.path(shards[0])]
    assert Counting.reads == 1


PROCESS = textwrap.dedent("""
    import os, sys, time
    from pathlib import Path
    from qtrain.data.manifest import ShardInfo
    from qtrain.data.object_store import ObjectStore
    from qtrain.data.shard_cache import ShardCache

    class Slow(ObjectStore):
        def read_range(self, name, start, stop):
            print("reading", flush=True)
            time.sleep(float(sys.argv[4]))
            return super().read_range(name, start, stop)

    sys.stdin.readline()
    handle = ShardCache(Path(sys.argv[1]), 10_000).take(ShardInfo("0.bin", 500, 1000, sys.argv[3]), Slow(sys.argv[2]))
    print("has", len(os.pread(handle, 2000, 0)), flush=True)
""")


def started(cache, store, info, seconds) -> subprocess.Popen:
    command = [
        sys.executable,
        "-c",
        PROCESS,
        str(cache.folder),
        store.address,
        str(info.sha256),
        str(seconds),
    ]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def test_processes_of_one_machine_fetch_a_shard_once_and_a_killed_one_is_followed(store, shards, tmp_path):
    cache = cache_of(tmp_path, 10_000)
    first = started(cache, store, shards[0], 60)
    others = [started(cache, store, shards[0], 0.3) for _ in range(2)]
    first.stdin.write("go\n")
    first.stdin.flush()
    assert first.stdout.readline() == "reading\n"
    for process in others:
        process.stdin.write("go\n")
        process.stdin.flush()
    time.sleep(0.3)
    assert len(list(cache.folder.glob("*.partial"))) == 1
    first.kill()
    first.wait()
    said = "".join(process.communicate(timeout=60)[0] for process in others)
    assert said.count("reading\n") == 1
    assert said.count("has 1000\n") == 2
    assert not list(cache.folder.glob(".*.partial"))
