"""Writing token shards: a directory appears complete or not at all.

It is written beside its place (``partial_folders``), every file is fsynced, and one rename publishes it. Two
processes that prepare the same data at once both end with the directory of whoever was first; what a killed one
leaves is read by nobody and removed by the next.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qtrain.data.manifest import MANIFEST, SPLITS, TOKENIZER, Manifest, ShardInfo, SplitInfo, token_dtype
from qtrain.data.partial_folders import partial_folder, remove_stale, sync_folder
from qtrain.data.tokenizers import Tokenizer

# 2^28 uint16 tokens are 512 MiB: few files for large corpora, and each still copies and hashes in seconds.
DEFAULT_SHARD_TOKENS = 1 << 28
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room there"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it writable"),
    **dict.fromkeys((errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR), "move away what lies in its place"),
}


class ShardWriteError(OSError):
    """Prepared data could not be written. ``errno`` is that of the cause; nothing was published."""


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Errors of the operating system inside become ShardWriteErrors that name ``directory`` and the remedy."""
    try:
        yield
    except ShardWriteError:
        raise
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "mend that")
        at = "" if error.filename in (None, str(directory)) else f" (at {error.filename})"
        raise ShardWriteError(
            error.errno,
            f"cannot write the prepared data {directory}: {error.strerror or error}{at}. Nothing was published; "
            f"{remedy}, or let prepared data lie elsewhere: data.folder=DIR, or QTRAIN_CACHE=DIR in the environment",
        ) from error


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

    def abandon(self) -> None:
        """Gives the file up; what its buffer holds may fail to be written again."""
        with suppress(OSError):
            self._file.close()

    def info(self) -> SplitInfo:
        return SplitInfo(
            sum(shard.tokens for shard in self.shards), self.documents, self.text_bytes, tuple(self.shards)
        )


class ShardWriter:
    """Receives documents for the splits; made by ``write_shards``. directory: the place, for messages."""

    def __init__(self, directory: Path, folder: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self.directory, self.tokenizer = directory, tokenizer
        self.dtype = token_dtype(tokenizer.vocab_size)
        self._eot = np.array([tokenizer.eot_token], dtype=np.int64)
        self._splits = {name: _SplitWriter(folder, name, self.dtype, shard_tokens) for name in SPLITS}

    def append(self, split: str, text: str) -> None:
        """Writes the tokens of one document, followed by the end-of-document token.

        Raises ValueError when the tokenizer gives an id outside its vocabulary, which a narrow dtype would
        wrap into another token, and ShardWriteError where the disk is full.
        """
        self.append_tokens(split, np.asarray(self.tokenizer.encode(text)), len(text.encode("utf-8")))

    def append_tokens(self, split: str, ids: NDArray[Any], text_bytes: int) -> None:
        """``append`` of a document that is encoded already. text_bytes: UTF-8 bytes of its text."""
        writer = self._splits[split]
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= self.tokenizer.vocab_size):
            raise ValueError(
                f"tokenizer {self.tokenizer.name!r} produced ids in [{ids.min()}, {ids.max()}], outside "
                f"[0, {self.tokenizer.vocab_size}); its vocab_size must cover every id"
            )
        with writing(self.directory):
            writer.write(ids)
            writer.write(self._eot)
        writer.documents += 1
        writer.text_bytes += text_bytes

    def append_split(
        self, split: str, blocks: Iterable[NDArray[Any]], documents: int, text_bytes: int
    ) -> None:
        """Tokens of another folder of the same tokenizer, with the end-of-document tokens in them."""
        writer = self._splits[split]
        for block in blocks:
            with writing(self.directory):
                writer.write(block)
        writer.documents += documents
        writer.text_bytes += text_bytes

    def finish(self, source: dict[str, Any], settings: dict[str, Any]) -> Manifest:
        for writer in self._splits.values():
            writer.close()
        splits = {name: writer.info() for name, writer in self._splits.items()}
        return Manifest(self.tokenizer.about, self.dtype.name, splits, source, settings)

    def abandon(self) -> None:
        for writer in self._splits.values():
            writer.abandon()


def _publish(partial: Path, directory: Path) -> None:
    """Renames ``partial`` to ``directory``; where another process was first, its directory stays."""
    try:
        partial.rename(directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not (directory / MANIFEST).is_file():
            raise
    sync_folder(directory.parent)


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
    ``directory`` and the partial folder is removed; so is what killed writers of ``directory`` left. Raises
    ShardWriteError where something cannot be written.
    """
    directory = Path(directory)
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens {shard_tokens} must be at least 1; the default is 2^28")
    remove_stale(directory)
    with ExitStack() as stack:
        with writing(directory):
            directory.parent.mkdir(parents=True, exist_ok=True)
            partial = stack.enter_context(partial_folder(directory))
            writer = ShardWriter(directory, partial, tokenizer, shard_tokens)
        stack.callback(writer.abandon)
        yield writer
        with writing(directory):
            tokenizer.save(partial / TOKENIZER)
            manifest = writer.finish(source or {}, settings or {})
            with (partial / MANIFEST).open("w", encoding="utf-8") as file:
                file.write(json.dumps(asdict(manifest), indent=1))
                file.flush()
                os.fsync(file.fileno())
            sync_folder(partial)
            _publish(partial, directory)
