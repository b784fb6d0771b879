"""Token shards: tokenized splits as memory-mapped files beside a manifest.

    DIR/manifest.json        format version, tokenizer, dtype, and of each shard: file, tokens, bytes, sha256
    DIR/train-00000.bin ...  little-endian uint16 (vocabularies up to 65,536) or uint32, no header
    DIR/val-00000.bin ...

A directory appears complete or not at all: it is written beside its place as ``.NAME.XXXX.partial``, every
file is fsynced, and one rename publishes it. Two processes that prepare the same data at once both end with
the directory of whoever was first; a killed one leaves only its ``.partial`` folder, which nothing reads.

Shards are checked when opened, since a silently altered byte would be a silently different experiment.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qtrain.data.tokenizers import Tokenizer

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
# 2^28 uint16 tokens are 512 MiB: few files for large corpora, and each still copies and hashes in seconds.
DEFAULT_SHARD_TOKENS = 1 << 28
_READ_BYTES = 1 << 22


class ShardError(ValueError):
    """A shard directory that is missing, incomplete or altered."""


@dataclass(frozen=True)
class ShardInfo:
    """One file. ``bytes`` = ``tokens`` * item size of the dtype."""

    file: str
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """One split. ``text_bytes``: UTF-8 bytes of its documents, the denominator of bits per byte."""

    tokens: int
    documents: int
    text_bytes: int
    shards: tuple[ShardInfo, ...]


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says. ``tokenizer``: name, vocab_size, eot_token."""

    tokenizer: dict[str, Any]
    dtype: str
    splits: dict[str, SplitInfo]
    source: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer["vocab_size"])

    @staticmethod
    def from_json(text: str) -> Manifest:
        raw = json.loads(text)
        raw["splits"] = {
            name: SplitInfo(**{**split, "shards": tuple(ShardInfo(**shard) for shard in split["shards"])})
            for name, split in raw["splits"].items()
        }
        return Manifest(**raw)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest little-endian type that holds ids in [0, vocab_size)."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class _SplitWriter:
    """Appends tokens to ``SPLIT-00000.bin``, ``SPLIT-00001.bin``, ... of ``shard_tokens`` tokens each."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.documents = self.text_bytes = 0
        self.shards: list[ShardInfo] = []
        self._open()

    def _open(self) -> None:
        self._name = f"{self.split}-{len(self.shards):05d}.bin"
        self._file = (self.folder / self._name).open("wb")
        self._digest = hashlib.sha256()
        self._tokens = 0

    def write(self, ids: NDArray[Any]) -> None:
        while len(ids):
            if self._tokens == self.shard_tokens:
                self.close()
                self._open()
            part = ids[: self.shard_tokens - self._tokens]
            data = np.ascontiguousarray(part, dtype=self.dtype).tobytes()
            self._file.write(data)
            self._digest.update(data)
            self._tokens += len(part)
            ids = ids[len(part) :]

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        size = self._tokens * self.dtype.itemsize
        self.shards.append(ShardInfo(self._name, self._tokens, size, self._digest.hexdigest()))

    def info(self) -> SplitInfo:
        return SplitInfo(
            sum(shard.tokens for shard in self.shards), self.documents, self.text_bytes, tuple(self.shards)
        )


class ShardWriter:
    """Receives documents for the splits; made by ``write_shards``."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
        if shard_tokens < 1:
            raise ValueError(f"shard_tokens {shard_tokens} must be at least 1; the default is 2^28")
        self.tokenizer = tokenizer
        self.dtype = token_dtype(tokenizer.vocab_size)
        self._eot = np.array([tokenizer.eot_token], dtype=np.int64)
        self._splits = {name: _SplitWriter(folder, name, self.dtype, shard_tokens) for name in SPLITS}

    def append(self, split: str, text: str) -> None:
        """Writes the tokens of one document, followed by the end-of-document token.

        Raises ValueError when the tokenizer gives an id outside its vocabulary, which a narrow dtype would
        wrap into another token.
        """
        writer = self._splits[split]
        ids = np.asarray(self.tokenizer.encode(text))
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= self.tokenizer.vocab_size):
            raise ValueError(
                f"tokenizer {self.tokenizer.name!r} produced ids in [{ids.min()}, {ids.max()}], outside "
                f"[0, {self.tokenizer.vocab_size}); its vocab_size must cover every id"
            )
        writer.write(ids)
        writer.write(self._eot)
        writer.documents += 1
        writer.text_bytes += len(text.encode("utf-8"))

    def finish(self, source: dict[str, Any], settings: dict[str, Any]) -> Manifest:
        for writer in self._splits.values():
            writer.close()
        names = {key: getattr(self.tokenizer, key) for key in ("name", "vocab_size", "eot_token")}
        splits = {name: writer.info() for name, writer in self._splits.items()}
        return Manifest(names, self.dtype.name, splits, source, settings)


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(partial: Path, directory: Path) -> None:
    """Renames ``partial`` to ``directory``; where another process was first, its directory stays."""
    try:
        partial.rename(directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not (directory / MANIFEST).is_file():
            raise
        shutil.rmtree(partial)
    _fsync_folder(directory.parent)


@contextmanager
def write_shards(
    directory: str | Path,
    tokenizer: Tokenizer,
    *,
    source: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
) -> Iterator[ShardWriter]:
    """``with write_shards(...) as writer: writer.append("train", text)``: publishes ``directory`` at the end.

    ``source`` and ``settings`` (JSON values) are recorded in the manifest. On an exception nothing appears at
    ``directory`` and the partial folder is removed.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
    try:
        partial.chmod(0o777 & ~_umask())
        writer = ShardWriter(partial, tokenizer, shard_tokens)
        yield writer
        manifest = writer.finish(source or {}, settings or {})
        with (partial / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(asdict(manifest), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _fsync_folder(partial)
        _publish(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _umask() -> int:
    """The process's file mode mask (it can only be read by setting it); mkdtemp ignores it and gives 0700."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


class ShardSplit:
    """The tokens of one split as if they were one array, read from memory-mapped files.

    Pickling (for DataLoader workers that are spawned) carries the paths, never the tokens.
    """

    def __init__(self, directory: Path, name: str, info: SplitInfo, dtype: str) -> None:
        self.directory, self.name, self.info, self.dtype = directory, name, info, np.dtype(dtype)
        self._starts = np.concatenate([[0], np.cumsum([s.tokens for s in info.shards], dtype=np.int64)])
        self._maps: list[NDArray[Any]] | None = None

    def __len__(self) -> int:
        """Number of tokens."""
        return self.info.tokens

    @property
    def tokens_per_byte(self) -> float:
        """Tokens per UTF-8 byte: bits per byte = nats per token * tokens_per_byte / ln 2."""
        return self.info.tokens / self.info.text_bytes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": None}

    def _arrays(self) -> list[NDArray[Any]]:
        if self._maps is None:
            little_endian = self.dtype.newbyteorder("<")
            self._maps = [
                np.memmap(self.directory / shard.file, dtype=little_endian, mode="r")
                if shard.tokens
                else np.empty(0, dtype=little_endian)
                for shard in self.info.shards
            ]
        return self._maps

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens [stop - start] of the half-open range, across shard boundaries; raises IndexError outside."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(
                f"tokens [{start}, {stop}) are outside split {self.name!r} of {len(self)} tokens"
            )
        tokens = np.empty(stop - start, dtype=self.dtype)
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        done = 0
        while done < len(tokens):
            offset = start + done - int(self._starts[shard])
            part = self._arrays()[shard][offset : offset + len(tokens) - done]
            tokens[done : done + len(part)] = part
            done += len(part)
            shard += 1
        return tokens


class TokenShards:
    """An opened shard directory: ``manifest``, ``train`` and ``val``."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self.train, self.val = (
            ShardSplit(directory, name, manifest.splits[name], manifest.dtype) for name in SPLITS
        )

    def check_unchanged(self) -> None:
        """Raises ShardError where a shard has another size than when it was prepared."""
        for split in self.manifest.splits.values():
            for shard in split.shards:
                _verify(self.directory / shard.file, shard, "size", "prepare again")

    @staticmethod
    def open(directory: str | Path, verify: Literal["sha256", "size"] = "sha256") -> TokenShards:
        """Opens and checks ``directory``.

        ``verify``: "sha256" reads every byte (about 1 GB/s); "size" compares file sizes only, for data too
        large to read at each start. Raises ShardError, naming the file and the remedy, on anything amiss.
        """
        if verify not in ("sha256", "size"):
            raise ValueError(f"verify {verify!r} is unknown; allowed: 'sha256', 'size'")
        directory = Path(directory)
        remedy = f"delete the folder {directory} and prepare again"
        path = directory / MANIFEST
        if not path.is_file():
            raise ShardError(f"{directory} holds no {MANIFEST}, so it is no shard directory; {remedy}")
        try:
            manifest = Manifest.from_json(path.read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{path} is not a readable manifest ({error!r}); {remedy}") from error
        if manifest.format_version != FORMAT_VERSION:
            raise ShardError(
                f"{path} has format version {manifest.format_version}, this code reads {FORMAT_VERSION}; {remedy}"
            )
        if set(manifest.splits) != set(SPLITS):
            raise ShardError(
                f"{path} has splits {sorted(manifest.splits)}, expected {list(SPLITS)}; {remedy}"
            )
        for split in manifest.splits.values():
            for shard in split.shards:
                _verify(directory / shard.file, shard, verify, remedy)
        return TokenShards(directory, manifest)


def _verify(path: Path, shard: ShardInfo, verify: str, remedy: str) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != shard.bytes:
        found = "missing" if size is None else f"{size} bytes long"
        raise ShardError(f"shard {path} is {found}, its manifest says {shard.bytes} bytes; {remedy}")
    if verify == "size":
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    if digest.hexdigest() != shard.sha256:
        raise ShardError(
            f"shard {path} was altered: its sha256 is {digest.hexdigest()}, its manifest says {shard.sha256}; "
            f"{remedy}"
        )
