"""A file of tokens that is checked when opened and read with ``pread`` on the descriptor that was checked.

A silently altered byte would be a silently different experiment. A memory map is about as fast, but a file that is
truncated under it kills the process with SIGBUS. What happens to the files of a running job is defined:

    replaced or removed       it reads the files that it opened, to its end; the next one opens, and checks, anew
    truncated                 the read that meets the end raises ShardError
    altered in place          reads give the new bytes, and ``check_unchanged`` raises ShardError: a checkpoint
                              that is written after it holds no step on altered data
    touched, copied in place  the sha256 is computed once more, and found to be the same

The one thing that no check sees is an alteration that was undone before the check. A file whose sha256 is not known
(it is too large to be read at every start) is held to its size and modification time instead, and a touch is then an
alteration.
"""

from __future__ import annotations

import errno
import hashlib
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtrain.data.file_stamps import FileStamp
from qtrain.data.manifest import ShardInfo

_HASHED_BYTES = 1 << 22


class ShardError(ValueError):
    """Files of tokens that are missing, incomplete or altered."""


@dataclass(frozen=True)
class Wording:
    """What messages say of a file. kind: what it is. witness: who says how long it is and what its sha256 is. restore:
    how to get it back before a run. rewind: how to go on when it was altered under a run."""

    kind: str
    witness: str
    restore: str
    rewind: str

    @staticmethod
    def of_shard(folder: Path) -> Wording:
        return Wording(
            "shard",
            "its manifest says",
            f"delete the folder {folder} and prepare again",
            f"go back to a checkpoint from before that: delete the folder {folder}, let it be prepared again and resume "
            "from there",
        )


class CheckedFile:
    """One file. ``info``: what is known of its bytes.

    A descriptor has no position that ``pread`` would move, so forked processes share it. A pickled copy opens its
    own, and where the path holds another file by then, that one must have the same bytes.
    """

    def __init__(self, path: Path, info: ShardInfo, wording: Wording) -> None:
        self.path, self.info, self._says = path, info, wording
        self._handle: int | None = None
        self._stamp: FileStamp | None = None
        self._closing: weakref.finalize[Any, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "_closing": None}

    def open(self, *, hashed: bool) -> None:
        """Opens and checks the file. Raises ShardError."""
        handle = self._descriptor()
        self._closing = weakref.finalize(self, os.close, handle)
        stamp = FileStamp.of(handle)
        if stamp.size != self.info.bytes:
            raise ShardError(
                f"{self._says.kind} {self.path} is {stamp.size} bytes long, {self._says.witness} {self.info.bytes} bytes; "
                f"{self._says.restore}"
            )
        if hashed or (self._stamp is not None and not self._stamp.shows(stamp)):
            self._check_bytes(handle, stamp)
        self._handle, self._stamp = handle, stamp

    def _descriptor(self) -> int:
        """Of the file, newly opened."""
        name, remedy = f"{self._says.kind} {self.path}", self._says.restore
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ShardError(
                f"{name} is missing, {self._says.witness} {self.info.bytes} bytes; {remedy}"
            ) from None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                remedy = "allow more open files (ulimit -n), or prepare again with larger shard_tokens"
            raise ShardError(f"{name} cannot be opened: {error.strerror}; {remedy}") from error

    def _check_bytes(self, handle: int, stamp: FileStamp) -> None:
        name, remedy = f"{self._says.kind} {self.path}", self._says.restore
        if self.info.sha256 is None:
            if not self._same_time(stamp):
                raise ShardError(f"{name} was altered or touched since it was opened; {remedy}")
            return
        found = self._sha256(handle)
        if found != self.info.sha256:
            raise ShardError(
                f"{name} was altered: its sha256 is {found}, {self._says.witness} {self.info.sha256}; {remedy}"
            )

    def _same_time(self, stamp: FileStamp) -> bool:
        return self._stamp is None or self._stamp.modified_ns == stamp.modified_ns

    def _opened(self) -> int:
        if self._handle is None:
            self.open(hashed=False)
        assert self._handle is not None
        return self._handle

    def ahead(self) -> None:
        """It will be read soon. A file that is here needs nothing."""

    def release(self) -> None:
        """It will not be read for some time."""

    def pread(self, count: int, offset: int) -> bytes:
        """``count`` bytes from byte ``offset``. Raises ShardError where the file ends before or cannot be read."""
        handle = self._opened()
        data = self._pread(handle, count, offset)
        while len(data) < count and (more := self._pread(handle, count - len(data), offset + len(data))):
            data += more
        if len(data) < count:
            raise ShardError(
                f"{self._says.kind} {self.path} ends early: at byte {offset} it gave {len(data)} of {count} bytes, so "
                f"it was truncated while the run read it; {self._says.rewind}"
            )
        return data

    def _pread(self, handle: int, count: int, offset: int) -> bytes:
        """At most ``count`` bytes; fewer at the end, or after a signal."""
        try:
            return os.pread(handle, count, offset)
        except OSError as error:
            raise ShardError(
                f"{self._says.kind} {self.path} cannot be read at byte {offset}: {error.strerror}; see to the disk, "
                "then resume from the last checkpoint"
            ) from error

    def check_unchanged(self) -> None:
        """Raises ShardError where the bytes behind the descriptor are not those of ``info`` any more."""
        handle = self._opened()
        stamp = FileStamp.of(handle)
        if self._stamp is not None and self._stamp.shows(stamp):
            return
        same = stamp.size == self.info.bytes
        if self.info.sha256 is None:
            same = same and self._same_time(stamp)
        if not same or (self.info.sha256 is not None and self._sha256(handle) != self.info.sha256):
            raise ShardError(
                f"{self._says.kind} {self.path} was altered while the run read it; {self._says.rewind}"
            )
        self._stamp = stamp

    def _sha256(self, handle: int) -> str:
        digest, offset = hashlib.sha256(), 0
        while block := self._pread(handle, _HASHED_BYTES, offset):
            digest.update(block)
            offset += len(block)
        return digest.hexdigest()
