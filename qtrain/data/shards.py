"""Reading tokens: the splits of a prepared folder (``manifest``, ``shard_writer``), or of anybody's token files
(``token_files``), as arrays of tokens. The files are checked when opened (``checked_file``)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qtrain.data.checked_file import CheckedFile, ShardError, Wording
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
    "TokenSplit",
    "token_dtype",
    "write_shards",
]


FileOf = Callable[[ShardInfo], CheckedFile]


def read_manifest(data: bytes, place: str, remedy: str) -> Manifest:
    """Of the bytes of a ``manifest.json`` at ``place``. Raises ShardError where this code cannot read it."""
    try:
        manifest = Manifest.from_json(data.decode("utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{place} is not a readable manifest ({error!r}); {remedy}") from error
    if manifest.format_version != FORMAT_VERSION:
        raise ShardError(
            f"{place} has format version {manifest.format_version}, this code reads {FORMAT_VERSION}; {remedy}"
        )
    if set(manifest.splits) != set(SPLITS):
        raise ShardError(f"{place} has splits {sorted(manifest.splits)}, expected {list(SPLITS)}; {remedy}")
    return manifest


@dataclass(frozen=True)
class Segment:
    """``tokens`` tokens of ``file`` from byte ``offset``."""

    file: CheckedFile
    offset: int
    tokens: int


class TokenSplit:
    """The tokens of ``segments`` as if they were one array. Pickling carries paths, never tokens or descriptors.

    name: for messages. place: what holds the files. stored: of the ids on disk. vocab_size: ids lie below it. restore:
    what to do where they do not.
    """

    def __init__(
        self,
        name: str,
        place: Path,
        segments: Sequence[Segment],
        stored: np.dtype[Any],
        vocab_size: int,
        restore: str,
    ) -> None:
        self.name, self.place, self.segments, self.vocab_size = name, place, list(segments), vocab_size
        self.files = list(dict.fromkeys(segment.file for segment in self.segments))
        self.dtype = stored.newbyteorder("=")
        self._starts = list(accumulate((segment.tokens for segment in self.segments), initial=0))
        self._stored, self._restore = stored, restore

    def __len__(self) -> int:
        """Number of tokens."""
        return self._starts[-1]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens [stop - start] of the half-open range, across files.

        Raises IndexError outside, and ShardError where a file was truncated since it was opened.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(
                f"tokens [{start}, {stop}) are outside split {self.name!r} of {len(self)} tokens"
            )
        tokens = np.empty(stop - start, dtype=self.dtype)
        i = bisect_right(self._starts, start) - 1
        done, width = 0, self.dtype.itemsize
        while done < len(tokens):
            segment, skipped = self.segments[i], start + done - self._starts[i]
            count = min(len(tokens) - done, segment.tokens - skipped)
            data = segment.file.pread(count * width, segment.offset + skipped * width)
            tokens[done : done + count] = np.frombuffer(data, dtype=self._stored)
            done += count
            i += 1
        self._check_ids(tokens, start)
        return tokens

    def _check_ids(self, tokens: NDArray[Any], start: int) -> None:
        """An embedding would fail on such an id by an index, on a GPU by an abort."""
        if not len(tokens):
            return
        worst = int(tokens.max())
        if tokens.dtype.kind == "i" and (least := int(tokens.min())) < 0:
            worst = least
        if not 0 <= worst < self.vocab_size:
            raise ShardError(
                f"split {self.name!r} of {self.place} holds the id {worst} in tokens [{start}, {start + len(tokens)}), "
                f"outside its vocabulary of {self.vocab_size}: it was altered while the run read it; {self._restore} "
                "and resume from the last checkpoint"
            )

    def part(self, name: str, start: int, stop: int) -> TokenSplit:
        """The tokens [start, stop) as a split of their own."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(
                f"tokens [{start}, {stop}) are outside split {self.name!r} of {len(self)} tokens"
            )
        found = []
        for segment, first in zip(self.segments, self._starts, strict=False):
            low, high = max(start, first), min(stop, first + segment.tokens)
            if low < high:
                offset = segment.offset + (low - first) * self._stored.itemsize
                found.append(Segment(segment.file, offset, high - low))
        return TokenSplit(name, self.place, found, self._stored, self.vocab_size, self._restore)

    def check_unchanged(self) -> None:
        """Raises ShardError unless every file holds the bytes that it was opened with.

        It costs a system call a file; where size, times or inode are not those of the last check, or were too young
        then to show a change, the file's sha256 is computed anew (about 1 GB/s).
        """
        for file in self.files:
            file.check_unchanged()


class ShardSplit(TokenSplit):
    """A split of a prepared folder. ``info``: what its manifest says."""

    def __init__(
        self, directory: Path, name: str, info: SplitInfo, dtype: str, vocab_size: int, file: FileOf
    ) -> None:
        self.directory, self.info = directory, info
        segments = [Segment(file(shard), 0, shard.tokens) for shard in info.shards]
        stored = np.dtype(dtype).newbyteorder("<")
        restore = "delete that folder, let it be prepared again"
        super().__init__(name, directory, segments, stored, vocab_size, restore)

    @property
    def tokens_per_byte(self) -> float:
        """Tokens per UTF-8 byte: bits per byte = nats per token * tokens_per_byte / ln 2."""
        return self.info.tokens / self.info.text_bytes


class TokenShards:
    """An opened shard directory: ``manifest``, ``train`` and ``val``. file: of a shard; default: the one in
    ``directory``."""

    def __init__(self, directory: Path, manifest: Manifest, file: FileOf | None = None) -> None:
        self.directory, self.manifest = directory, manifest
        wording = Wording.of_shard(directory)
        of = file or (lambda shard: CheckedFile(directory / shard.file, shard, wording))
        self.train, self.val = (
            ShardSplit(directory, name, manifest.splits[name], manifest.dtype, manifest.vocab_size, of)
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
        shards = TokenShards(directory, read_manifest(path.read_bytes(), str(path), remedy))
        for split in (shards.train, shards.val):
            for file in split.files:
                file.open(hashed=verify == "sha256")
        return shards

    def check_unchanged(self) -> None:
        """``ShardSplit.check_unchanged`` of both splits: called before a checkpoint is written."""
        self.train.check_unchanged()
        self.val.check_unchanged()
