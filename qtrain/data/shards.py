"""Reading token shards: the splits of a prepared folder (``manifest``, ``shard_writer``) as arrays of tokens.

Shards are checked when opened, since a silently altered byte would be a silently different experiment, and read
with ``pread`` on the descriptors that were checked. A memory map is about as fast, but a file that is truncated under
it kills the process with SIGBUS. What happens to the files of a running job is defined:

    replaced or removed       it reads the files that it opened, to its end; the next one opens, and checks, anew
    truncated                 the read that meets the end raises ShardError
    altered in place          reads give the new bytes, and ``check_unchanged`` raises ShardError: a checkpoint
                              that is written after it holds no step on altered data
    touched, copied in place  the sha256 is computed once more, and found to be the same

The one thing that no check sees is an alteration that was undone before the check.
"""

from __future__ import annotations

import errno
import hashlib
import os
import weakref
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qtrain.data.file_stamps import FileStamp
from qtrain.data.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Manifest,
    ShardInfo,
    SplitInfo,
    token_dtype,
)
from qtrain.data.shard_writer import DEFAULT_SHARD_TOKENS, ShardWriteError, write_shards
from qtrain.data.tokenizers import Tokenizer, TokenizerError, load_tokenizer

__all__ = [
    "DEFAULT_SHARD_TOKENS",
    "FORMAT_VERSION",
    "MANIFEST",
    "Manifest",
    "ShardError",
    "ShardInfo",
    "ShardSplit",
    "ShardWriteError",
    "SplitInfo",
    "TokenShards",
    "token_dtype",
    "write_shards",
]

_HASHED_BYTES = 1 << 22


class ShardError(ValueError):
    """A shard directory that is missing, incomplete or altered."""


class _ShardFile:
    """One shard. ``info``: what the manifest says of it.

    A descriptor has no position that ``pread`` would move, so forked processes share it. A pickled copy opens its
    own, and where the path holds another file by then, that one must have the same bytes.
    """

    def __init__(self, directory: Path, info: ShardInfo) -> None:
        self.path, self.info = directory / info.file, info
        self._handle: int | None = None
        self._stamp: FileStamp | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def open(self, *, hashed: bool) -> None:
        """Opens and checks the file. Raises ShardError."""
        remedy = f"delete the folder {self.path.parent} and prepare again"
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ShardError(
                f"shard {self.path} is missing, its manifest says {self.info.bytes} bytes; {remedy}"
            ) from None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                remedy = "allow more open files (ulimit -n), or prepare again with larger shard_tokens"
            raise ShardError(f"shard {self.path} cannot be opened: {error.strerror}; {remedy}") from error
        weakref.finalize(self, os.close, handle)
        stamp = FileStamp.of(handle)
        if stamp.size != self.info.bytes:
            raise ShardError(
                f"shard {self.path} is {stamp.size} bytes long, its manifest says {self.info.bytes} bytes; {remedy}"
            )
        if hashed or (self._stamp is not None and not self._stamp.shows(stamp)):
            found = self._sha256(handle)
            if found != self.info.sha256:
                raise ShardError(
                    f"shard {self.path} was altered: its sha256 is {found}, its manifest says {self.info.sha256}; "
                    f"{remedy}"
                )
        self._handle, self._stamp = handle, stamp

    def _opened(self) -> int:
        if self._handle is None:
            self.open(hashed=False)
        assert self._handle is not None
        return self._handle

    def pread(self, count: int, offset: int) -> bytes:
        """``count`` bytes from byte ``offset``. Raises ShardError where the file ends before or cannot be read."""
        handle = self._opened()
        data = self._pread(handle, count, offset)
        while len(data) < count and (more := self._pread(handle, count - len(data), offset + len(data))):
            data += more
        if len(data) < count:
            raise ShardError(
                f"shard {self.path} ends early: at byte {offset} it gave {len(data)} of {count} bytes, so it was "
                f"truncated while the run read it; {self._remedy()}"
            )
        return data

    def _pread(self, handle: int, count: int, offset: int) -> bytes:
        """At most ``count`` bytes; fewer at the end, or after a signal."""
        try:
            return os.pread(handle, count, offset)
        except OSError as error:
            raise ShardError(
                f"shard {self.path} cannot be read at byte {offset}: {error.strerror}; see to the disk, then resume "
                "from the last checkpoint"
            ) from error

    def check_unchanged(self) -> None:
        """Raises ShardError where the bytes behind the descriptor are not those of the manifest any more."""
        handle = self._opened()
        stamp = FileStamp.of(handle)
        if self._stamp is not None and self._stamp.shows(stamp):
            return
        if stamp.size != self.info.bytes or self._sha256(handle) != self.info.sha256:
            raise ShardError(f"shard {self.path} was altered while the run read it; {self._remedy()}")
        self._stamp = stamp

    def _remedy(self) -> str:
        return (
            "go back to a checkpoint from before that: delete the folder "
            f"{self.path.parent}, let it be prepared again and resume from there"
        )

    def _sha256(self, handle: int) -> str:
        digest, offset = hashlib.sha256(), 0
        while block := self._pread(handle, _HASHED_BYTES, offset):
            digest.update(block)
            offset += len(block)
        return digest.hexdigest()


class ShardSplit:
    """The tokens of one split as if they were one array. Pickling carries paths, never tokens or descriptors."""

    def __init__(self, directory: Path, name: str, info: SplitInfo, dtype: str, vocab_size: int) -> None:
        self.directory, self.name, self.info, self.dtype = directory, name, info, np.dtype(dtype)
        self.vocab_size = vocab_size
        self.files = [_ShardFile(directory, shard) for shard in info.shards]
        self._starts = list(accumulate((shard.tokens for shard in info.shards), initial=0))
        self._stored = self.dtype.newbyteorder("<")

    def __len__(self) -> int:
        """Number of tokens."""
        return self.info.tokens

    @property
    def tokens_per_byte(self) -> float:
        """Tokens per UTF-8 byte: bits per byte = nats per token * tokens_per_byte / ln 2."""
        return self.info.tokens / self.info.text_bytes

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens [stop - start] of the half-open range, across shard boundaries.

        Raises IndexError outside, and ShardError where a file was truncated since it was opened.
        """
        if not 0 <= start <= stop <= self.info.tokens:
            raise IndexError(
                f"tokens [{start}, {stop}) are outside split {self.name!r} of {len(self)} tokens"
            )
        tokens = np.empty(stop - start, dtype=self.dtype)
        shard = bisect_right(self._starts, start) - 1
        done, width = 0, self.dtype.itemsize
        while done < len(tokens):
            offset = start + done - self._starts[shard]
            count = min(len(tokens) - done, self.info.shards[shard].tokens - offset)
            data = self.files[shard].pread(count * width, offset * width)
            tokens[done : done + count] = np.frombuffer(data, dtype=self._stored)
            done += count
            shard += 1
        if len(tokens) and int(tokens.max()) >= self.vocab_size:
            # An embedding would fail on it by an index, on a GPU by an abort
            raise ShardError(
                f"split {self.name!r} of {self.directory} holds the id {tokens.max()} in tokens [{start}, {stop}), outside "
                f"its vocabulary of {self.vocab_size}: it was altered while the run read it; delete that folder, let it be "
                "prepared again and resume from the last checkpoint"
            )
        return tokens

    def check_unchanged(self) -> None:
        """Raises ShardError unless every file holds the bytes that its manifest names.

        It costs a system call a file; where size, times or inode are not those of the last check, or were too young
        then to show a change, the file's sha256 is computed anew (about 1 GB/s).
        """
        for file in self.files:
            file.check_unchanged()


class TokenShards:
    """An opened shard directory: ``manifest``, ``train`` and ``val``."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self.train, self.val = (
            ShardSplit(directory, name, manifest.splits[name], manifest.dtype, manifest.vocab_size)
            for name in SPLITS
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that wrote the tokens, from their own folder. Raises ShardError where it was altered."""
        try:
            found = load_tokenizer(self.directory / TOKENIZER)
        except TokenizerError as error:
            raise ShardError(f"{error}; delete the folder {self.directory} and prepare again") from error
        if found.digest != self.manifest.tokenizer["digest"]:
            raise ShardError(
                f"{self.directory / TOKENIZER} is not the tokenizer of the manifest beside it; delete the folder "
                f"{self.directory} and prepare again"
            )
        return found

    @staticmethod
    def open(directory: str | Path, verify: Literal["sha256", "size"] = "sha256") -> TokenShards:
        """Opens and checks ``directory``.

        ``verify``: "sha256" reads every byte (about 1 GB/s); "size" compares file sizes only, for data too
        large to read at each start. Raises ShardError, naming the file and the remedy, on anything amiss.
        A descriptor for each file stays open as long as the object lives.
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
        shards = TokenShards(directory, manifest)
        for split in (shards.train, shards.val):
            for file in split.files:
                file.open(hashed=verify == "sha256")
        return shards

    def check_unchanged(self) -> None:
        """``ShardSplit.check_unchanged`` of both splits: called before a checkpoint is written."""
        self.train.check_unchanged()
        self.val.check_unchanged()
