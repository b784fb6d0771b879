"""Shards of object stores on this machine's disk: fetched when first needed, checked, shared, and bounded.

    FOLDER/SHA256.bin     a shard, named by the contents that it was found to have
    FOLDER/SHA256.lock    held (flock) by the one process that fetches it; the others wait and find it. Its time says when
                          the shard was last taken, and it holds the stamp that the shard had when its bytes were checked

Where room is needed, the shards that were taken longest ago go. A reader holds a shared flock on the shard itself, and
what is held stays; a kernel gives both up when a process ends, however it ends. What a killed fetch left is named by
its shard, and removed by the next fetch of that shard.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from qtrain.data.cache import sha256_of
from qtrain.data.checked_file import ShardError
from qtrain.data.file_stamps import FileStamp
from qtrain.data.manifest import ShardInfo
from qtrain.data.object_store import ObjectMissing, ObjectStore
from qtrain.data.progress import LINE_SECONDS

# One request of a store gives tens of MB/s; blocks of 16 MiB, eight at once, are 128 MiB of memory and fill 10 Gbit/s
BLOCK_BYTES, BLOCKS_AT_ONCE = 16 << 20, 8
_REMEDY = "upload it anew (delete it and the manifest there, and prepare again), then go on with resume=auto"


class ShardCache:
    """folder: made where it is missing. limit_bytes: of shards in it, by all runs on this machine together.

    What a run needs at this moment is fetched even where only shards in use fill the limit; reading ahead is not.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._reader: _Reader | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_reader": None}

    def path(self, info: ShardInfo) -> Path:
        return self.folder / f"{info.sha256}.bin"

    def take(self, info: ShardInfo, store: ObjectStore) -> int:
        """A descriptor of the shard's file, which stays as long as the descriptor is open; it was fetched from ``store``
        where it was not here.

        Raises ShardError where the object is missing or not what ``info`` says, StoreUnreachable where the store is out
        of reach, and OSError as the disk does.
        """
        with self._locked(info, wait=True) as lock:
            path = self.path(info)
            if not _whole(path, info, lock):
                self._fetch(info, store)
                _note(path, lock)
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(handle, fcntl.LOCK_SH)
            return handle

    def ahead(self, info: ShardInfo, store: ObjectStore) -> None:
        """Fetches the shard in a thread. What fails is met again, and said, when the shard is needed."""
        if self._reader is None or self._reader.process != os.getpid():
            self._reader = _Reader(self)
        self._reader.wanted.put((info, store))

    def fetch_if_room(self, info: ShardInfo, store: ObjectStore) -> None:
        """What ``ahead`` does in its thread."""
        if self.path(info).is_file() or self._make_room(info.bytes):
            os.close(self.take(info, store))

    @contextmanager
    def _locked(self, info: ShardInfo, wait: bool) -> Iterator[int]:
        """Holds the lock file of a shard, and notes the time: its descriptor, or -1 where another holds it and ``wait`` is
        False."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.path(info).with_suffix(".lock")
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield -1
                return
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"the folder of fetched shards cannot lock files ({error.strerror}); give one on a local disk: data.folder=DIR",
                    str(self.folder),
                ) from error
            if wait:
                os.utime(handle)
            try:
                yield handle
            finally:  # closing is not enough where a process was forked meanwhile: it has the descriptor too
                fcntl.flock(handle, fcntl.LOCK_UN)
        finally:
            os.close(handle)

    def _fetch(self, info: ShardInfo, store: ObjectStore) -> None:
        """Under the shard's lock."""
        for left in self.folder.glob(f".{info.sha256}.*.partial"):
            left.unlink(missing_ok=True)
        if not self._make_room(info.bytes):
            print(
                f"{self.folder}: shards in use fill more than its limit of {self.limit_bytes / 1e9:,.1f} GB (data.cache_gib)",
                file=sys.stderr,
            )
        partial = self.folder / f".{info.sha256}.{os.getpid()}.partial"
        begun = time.monotonic()
        try:
            _download(info, store, partial)
            found = sha256_of(partial)
            if found != info.sha256:
                raise ShardError(
                    f"object {store.at(info.file)} was altered: its sha256 is {found}, its manifest says {info.sha256}; {_REMEDY}"
                )
            partial.rename(self.path(info))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(
                    error.errno,
                    f"no room for the shard {info.file} of {info.bytes / 1e9:,.2f} GB: make room, or give another folder "
                    "(data.folder=DIR) or a lower data.cache_gib",
                    str(self.folder),
                ) from error
            raise
        finally:
            partial.unlink(missing_ok=True)
        _say(f"fetched {store.at(info.file)}", info.bytes, time.monotonic() - begun)

    def _make_room(self, needed: int) -> bool:
        """Removes what was taken longest ago, until ``needed`` bytes fit. False where that is not enough."""
        found = []
        for path in self.folder.glob("*.bin"):
            with suppress(FileNotFoundError):
                found.append((path.with_suffix(".lock").stat().st_mtime_ns, path.stat().st_size, path))
        held = sum(size for _, size, _ in found) + self._arriving()
        for _, size, path in sorted(found):
            if held + needed <= self.limit_bytes:
                break
            if self._removed(path):
                held -= size
        return held + needed <= self.limit_bytes

    def _arriving(self) -> int:
        """Bytes of the shards that are being fetched; what killed fetches left is removed."""
        total = 0
        for partial in self.folder.glob(".*.partial"):
            info = ShardInfo(partial.name, 0, 0, partial.name.split(".")[1])
            with self._locked(info, wait=False) as lock, suppress(FileNotFoundError):
                if lock < 0:
                    total += partial.stat().st_size
                else:
                    partial.unlink()
        return total

    def _removed(self, path: Path) -> bool:
        """Whether the shard is gone: nobody takes it now, and nobody reads it."""
        info = ShardInfo(path.name, 0, 0, path.stem)
        with self._locked(info, wait=False) as lock:
            if lock < 0:
                return False
            try:  # for writing, without which NFS locks no file exclusively
                handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                return True
            except PermissionError:  # another user's
                return False
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            else:
                path.unlink(missing_ok=True)
                return True
            finally:
                os.close(handle)


class _Reader:
    """One thread of a process, for one shard after the other."""

    def __init__(self, cache: ShardCache) -> None:
        self.process, self.wanted = os.getpid(), queue.SimpleQueue[tuple[ShardInfo, ObjectStore]]()
        threading.Thread(target=self._work, args=(cache,), name="shard-ahead", daemon=True).start()

    def _work(self, cache: ShardCache) -> None:
        while True:
            info, store = self.wanted.get()
            with suppress(Exception):
                cache.fetch_if_room(info, store)


def _whole(path: Path, info: ShardInfo, lock: int) -> bool:
    """Whether the shard is here as it was checked, which the lock file has the stamp of; else its bytes are looked at. A
    file that was altered is removed, since the store has it."""
    try:
        stamp = _stamp(path)
        if stamp.size == info.bytes:
            if os.pread(lock, 4096, 0) == _as_bytes(stamp):
                return True
            if sha256_of(path) == info.sha256:
                _note(path, lock, stamp)
                return True
        path.unlink()
    except FileNotFoundError:
        pass
    return False


def _stamp(path: Path) -> FileStamp:
    with path.open("rb") as file:
        return FileStamp.of(file.fileno())


def _as_bytes(stamp: FileStamp) -> bytes:
    return json.dumps(stamp.as_list()[:-1]).encode()


def _note(path: Path, lock: int, stamp: FileStamp | None = None) -> None:
    """That the bytes were checked. stamp: from before they were; default: the one of now."""
    os.ftruncate(lock, 0)
    os.pwrite(lock, _as_bytes(stamp or _stamp(path)), 0)


def _download(info: ShardInfo, store: ObjectStore, path: Path) -> None:
    """The object into ``path``, in blocks that are tried again each by itself. Raises ShardError where it is missing or
    has another length."""
    try:
        size = store.size(info.file)
    except ObjectMissing as error:
        raise ShardError(
            f"object {store.at(info.file)} is missing, its manifest says {info.bytes} bytes; {_REMEDY}"
        ) from error
    if size != info.bytes:
        raise ShardError(
            f"object {store.at(info.file)} is {size} bytes long, its manifest says {info.bytes} bytes; {_REMEDY}"
        )
    path.touch()
    os.truncate(path, size)  # all of it counts toward the limit

    def fetch(start: int) -> int:
        stop = min(start + BLOCK_BYTES, size)
        data = store.read_range(info.file, start, stop)
        if len(data) != stop - start:
            raise ShardError(f"object {store.at(info.file)} was cut while it was read; {_REMEDY}")
        with path.open("r+b") as file:
            file.seek(start)
            file.write(data)
        return len(data)

    done, begun, next_line = 0, time.monotonic(), time.monotonic() + LINE_SECONDS
    for count in _by_threads(fetch, range(0, size, BLOCK_BYTES)):
        done += count
        if time.monotonic() >= next_line:
            next_line += LINE_SECONDS
            _say(f"fetching {store.at(info.file)}, {done / size:.0%}", done, time.monotonic() - begun)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _by_threads(fetch: Callable[[int], int], starts: Sequence[int]) -> Iterator[int]:
    """The results, in any order. The threads hold up neither an error nor the end of the program, as those of a pool
    would."""
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    found: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
    stop = threading.Event()
    for start in starts:
        todo.put(start)

    def work() -> None:
        while not stop.is_set():
            try:
                found.put(fetch(todo.get_nowait()))
            except queue.Empty:
                return
            except BaseException as error:
                found.put(error)
                return

    for _ in range(min(BLOCKS_AT_ONCE, len(starts))):
        threading.Thread(target=work, name="shard-block", daemon=True).start()
    try:
        for _ in starts:
            result = found.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        stop.set()


def _say(what: str, size: int, seconds: float) -> None:
    rate = size / max(seconds, 1e-6) / 1e6
    print(f"{what}: {size / 1e6:,.1f} MB in {seconds:,.1f} s, {rate:,.0f} MB/s", file=sys.stderr, flush=True)
