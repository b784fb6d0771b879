"""A prepared folder in an object store: written manifest last, read through this machine's cache (``shard_cache``).

A folder without a manifest is nobody's, so a half upload is never read; it is completed by the next one. The manifest
and the tokenizer, some kilobytes, are read at each start; a shard when a sample first needs it.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtrain.data.cache import cache_root
from qtrain.data.checked_file import CheckedFile, ShardError, Wording
from qtrain.data.manifest import MANIFEST, TOKENIZER, ShardInfo
from qtrain.data.object_store import ObjectMissing, ObjectStore, is_address
from qtrain.data.prepare import folder_name, prepare, settings_of
from qtrain.data.progress import LINE_SECONDS
from qtrain.data.shard_cache import ShardCache
from qtrain.data.shards import TokenShards, read_manifest
from qtrain.data.sources import TextSource
from qtrain.data.tokenizers import BpeTraining, Tokenizer

# Of disk for fetched shards on each machine, where nothing else is said
DEFAULT_CACHE_GIB = 64.0
# The shard that is read, the next one, and one more for a run beside this one
_SHARDS_AT_ONCE = 3
_REMEDY = "give the address of a folder that qtrain prepare wrote, or prepare it again"


class CacheTooSmall(ShardError):
    """The shards that an order needs at once do not fit: they would be fetched again and again."""


def upload(directory: Path, store: ObjectStore) -> None:
    """A prepared folder to the place of ``store``: shards that are not there in full size, the tokenizer, and at last
    the manifest. Raises StoreUnreachable."""
    manifest = read_manifest((directory / MANIFEST).read_bytes(), str(directory / MANIFEST), _REMEDY)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    total, done, begun = sum(s.bytes for s in shards), 0, time.monotonic()
    next_line = begun + LINE_SECONDS
    for shard in shards:
        if not _there(store, shard):
            store.write_file(directory / shard.file, shard.file)
        done += shard.bytes
        if time.monotonic() > next_line:
            next_line = time.monotonic() + LINE_SECONDS
            print(f"upload: {done / 1e6:,.0f} MB of {total / 1e6:,.0f} MB", file=sys.stderr, flush=True)
    for path in sorted((directory / TOKENIZER).iterdir()):
        store.write_file(path, f"{TOKENIZER}/{path.name}")
    store.write_file(directory / MANIFEST, MANIFEST)
    seconds = time.monotonic() - begun
    print(
        f"uploaded {total / 1e6:,.1f} MB to {store.address} in {seconds:,.1f} s", file=sys.stderr, flush=True
    )


def _there(store: ObjectStore, shard: ShardInfo) -> bool:
    try:
        return store.size(shard.file) == shard.bytes
    except ObjectMissing:
        return False


class StoredFile(CheckedFile):
    """A shard that is fetched when it is first read."""

    def __init__(self, store: ObjectStore, cache: ShardCache, info: ShardInfo) -> None:
        again = f"delete {cache.path(info)}"
        wording = Wording(
            "fetched shard", "its manifest says", again, f"{again} and resume from the last checkpoint"
        )
        super().__init__(cache.path(info), info, wording)
        self._store, self.cache = store, cache

    def _descriptor(self) -> int:
        """As long as it is open, the cache keeps the file."""
        return self.cache.take(self.info, self._store)

    def ahead(self) -> None:
        if self._handle is None:
            self.cache.ahead(self.info, self._store)

    def release(self) -> None:
        """Leaves the file to the cache, which may remove it; reading takes it again. Raises ShardError where it was altered,
        since the next checkpoint would not see it."""
        self.check_unchanged()
        if self._closing is not None:
            self._closing()
        self._handle = self._closing = None

    def check_unchanged(self) -> None:
        """Of what this process has open."""
        if self._handle is not None:
            super().check_unchanged()


def prepare_in(
    folder: str | None, source: TextSource, tokenizer: Tokenizer | BpeTraining, **settings: Any
) -> TokenShards:
    """``prepare`` with prepared folders below ``folder``, a path or an address. What is not at an address is prepared in
    ``cache_root()``, where it stays until somebody removes it, and uploaded. settings: of ``prepare``, which raises as it
    does; and StoreUnreachable."""
    if not is_address(folder):
        return prepare(source, tokenizer, folder, **settings)
    shape = {key: settings[key] for key in ("val_fraction", "shard_tokens")}
    name = folder_name(source.name, source.fingerprint(), tokenizer, settings_of(**shape))
    store = ObjectStore(str(folder)).below(name)
    if store.has(MANIFEST):
        return open_stored(store.address, fetched_shards())
    return put_in(folder, prepare(source, tokenizer, **settings))


def put_in(folder: str | None, shards: TokenShards) -> TokenShards:
    """``shards``; where ``folder`` is an address, those there, uploaded where they were not."""
    if not is_address(folder):
        return shards
    store = ObjectStore(str(folder)).below(shards.directory.name)
    if not store.has(MANIFEST):
        upload(shards.directory, store)
    return open_stored(store.address, fetched_shards())


def fetched_shards(folder: str | None = None, cache_gib: float = DEFAULT_CACHE_GIB) -> ShardCache:
    """The cache of fetched shards in ``folder`` (None: ``cache_root()``). Raises ValueError."""
    if isinstance(cache_gib, bool) or not isinstance(cache_gib, int | float) or not 0 < cache_gib < math.inf:
        raise ValueError(f"data.cache_gib={cache_gib!r}: must be a positive number of GiB")
    root = Path(folder).expanduser() if folder is not None else cache_root()
    return ShardCache(root / "fetched", int(cache_gib * (1 << 30)))


def begin_fetching(shards: TokenShards, shuffle: str) -> None:
    """In the background: the validation shards, and all others for an order that needs them. Raises
    CacheTooSmall."""
    train, val = ([file.info.bytes for file in split.files] for split in (shards.train, shards.val))
    needed = sum(val) + (sum(train) if shuffle == "windows" else sum(sorted(train)[-_SHARDS_AT_ONCE:]))
    (limit,) = {file.cache.limit_bytes for file in shards.train.files if isinstance(file, StoredFile)}
    if needed > limit:
        other = "; or take data.shuffle=shards, which needs few at once" if shuffle == "windows" else ""
        raise CacheTooSmall(
            f"data.cache_gib={limit / (1 << 30):.4g}: data.shuffle={shuffle} needs {needed / (1 << 30):.4g} GiB of shards on each "
            f"machine; give that much (a key of data=prepared){other}"
        )
    for file in (*shards.val.files, *(shards.train.files if shuffle == "windows" else ())):
        file.ahead()


def open_stored(address: str, cache: ShardCache) -> TokenShards:
    """The prepared folder at ``address``; no shard is fetched yet. Its ``directory`` is a folder of the same name in the
    cache, with manifest and tokenizer.

    Raises ShardError where none is there or this code cannot read it, and StoreUnreachable.
    """
    store = ObjectStore(address)
    try:
        manifest = store.read(MANIFEST)
        files = {name: store.read(f"{TOKENIZER}/{name}") for name in store.names(TOKENIZER)}
    except ObjectMissing as error:
        raise ShardError(f"{address} holds no whole prepared data: {error}; {_REMEDY}") from error
    found = read_manifest(manifest, store.at(MANIFEST), _REMEDY)
    place = hashlib.sha256(store.address.encode()).hexdigest()[:16]
    directory = cache.folder / "folders" / place / store.address.rsplit("/", 1)[-1]
    _write_whole(
        directory, {MANIFEST: manifest, **{f"{TOKENIZER}/{name}": data for name, data in files.items()}}
    )
    shards = TokenShards(directory, found, lambda shard: StoredFile(store, cache, shard))
    _ = shards.tokenizer  # raises where it is not the manifest's
    return shards


def _write_whole(directory: Path, files: Mapping[str, bytes]) -> None:
    """Each file by a rename, since other processes may read or write the same ones."""
    (directory / TOKENIZER).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = directory / name
        if path.is_file() and path.read_bytes() == content:
            continue
        partial = directory / f".{path.name}.{os.getpid()}.partial"
        try:
            partial.write_bytes(content)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
    for path in (directory / TOKENIZER).iterdir():
        if f"{TOKENIZER}/{path.name}" not in files:  # of other data that lay at this address before
            path.unlink(missing_ok=True)
