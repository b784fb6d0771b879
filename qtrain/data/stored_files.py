"""Text files in an object store, with as much of ``Path`` as sources need: they are read where they lie.

The bytes of a file are identified by what the store says of them (an ETag, a checksum, a blob), where it says something:
then nothing is read to see whether a preparation is there already.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import IO, Any

from qtrain.data.object_store import ObjectStore, StoreUnreachable

# What file systems of fsspec call the digest that a store keeps
_DIGESTS = ("ETag", "etag", "md5Hash", "crc32c", "content_md5", "blob_id", "oid")
# Read at once: few requests, and small beside a document's neighbours in memory
_READ_BYTES = 8 << 20


class StoredFileText:
    """One file: ``name`` below ``store``. info: what the store said of it."""

    def __init__(self, store: ObjectStore, name: str, info: dict[str, Any]) -> None:
        self._store, self._name, self._info = store, name, info
        self.name, self.suffix = PurePosixPath(name).name, PurePosixPath(name).suffix

    def __str__(self) -> str:
        return self._store.at(self._name)

    @property
    def size(self) -> int:
        return int(self._info["size"])

    def open(self, mode: str = "r", *, encoding: str | None = None, newline: str | None = None) -> IO[Any]:
        raw = io.BufferedReader(_Blocks(self._store, self._name, self.size), _READ_BYTES)
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding=encoding, newline=newline)

    def digest(self) -> str:
        """Of its contents, as the store has it; else their sha256."""
        for key in _DIGESTS:
            if self._info.get(key):
                return f"{key}:{self._info[key]}"
        found = hashlib.sha256()
        with self.open("rb") as file:
            while block := file.read(_READ_BYTES):
                found.update(block)
        return found.hexdigest()

    def stamp(self) -> list[Any]:
        """Of listing alone: size, and what says that it is another file."""
        said = [self._info.get(key) for key in (*_DIGESTS, "LastModified", "mtime", "created")]
        return [self.size, json.dumps(said, default=str)]


class _Blocks(io.RawIOBase):
    """The bytes of an object by ranges, each of which is tried again where the network fails."""

    def __init__(self, store: ObjectStore, name: str, size: int) -> None:
        self._store, self._name, self._size, self._at = store, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, (0, self._at, self._size)[whence] + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        if self._at >= stop:
            return 0
        data = self._store.read_range(self._name, self._at, stop)
        if not data:
            raise StoreUnreachable(
                f"{self._store.at(self._name)} ends at byte {self._at} of {self._size}: it was cut while it was read"
            )
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def stored_files(address: str, suffixes: Sequence[str]) -> list[StoredFileText]:
    """The file at an address, those below it that end in one of ``suffixes``, or those of a glob pattern; sorted."""
    scheme, rest = address.split("://", 1)
    fixed = rest.split("*")[0].rpartition("/")[0] if "*" in rest else rest.rstrip("/")
    store = ObjectStore(f"{scheme}://{fixed}")
    found = store.found(rest if "*" in rest else None)
    if "*" not in rest:
        single = "" in found
        found = {k: v for k, v in found.items() if single or k.endswith(tuple(suffixes))}
        if single:
            folder, _, name = fixed.rpartition("/")
            store, found = ObjectStore(f"{scheme}://{folder}"), {name: found[""]}
    return [StoredFileText(store, name, info) for name, info in sorted(found.items())]
