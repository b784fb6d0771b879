"""Token files of other programs (``token_formats``), read where they lie: nothing is converted or copied.

They get what our own shards get: ids are checked against the vocabulary, reads go to the descriptors that were
checked, an alteration under a run is found, and a run is resumed on the same bytes alone (``checked_file``). The first
run reads each file once for its sha256 and its largest id; both are kept in the cache, for as long as the file's inode
says that it is the same.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qtrain.data.cache import cache_root
from qtrain.data.checked_file import CheckedFile, ShardError, Wording
from qtrain.data.corpus import TokenizerSpec, check_recorded, ready_tokenizer, tokenizer_identity
from qtrain.data.file_stamps import FileStamp
from qtrain.data.manifest import ShardInfo
from qtrain.data.shards import Segment, TokenSplit
from qtrain.data.stream import TokenWindows, ValidationWindows
from qtrain.data.token_formats import KINDS, Layout, read_layout
from qtrain.data.tokenizers import Tokenizer
from qtrain.data.validation import ValidationSet

_BLOCK_TOKENS = 1 << 20
# Bits per byte need the bytes of the validation text: of its first 4M tokens, decoded within seconds
_DECODED_TOKENS = 1 << 22
# Tokens that ``verify=size`` looks at in each file, evenly spread
_SAMPLED_BLOCKS, _SAMPLED_TOKENS = 64, 4096


class TokenFiles:
    """train, val: a file, a folder (its ``.bin``), a pattern, or a list of them, each in sorted order; Megatron's by
    NAME or NAME.bin. val None: the last ``val_fraction`` of the tokens of ``train``, from a document's start where the
    format knows one. kind: ``auto``, nanogpt, llmc or megatron. dtype: of nanoGPT's files. tokenizer: the one that
    made the ids, for text and bits per byte; None: then ``vocab_size`` says where they end. verify: ``sha256``, or
    ``size`` for files too large to be read whole once: size, modification time and a sample of the ids.

    Raises ValueError, naming the value and the remedy.
    """

    def __init__(
        self,
        train: str | Sequence[str],
        val: str | Sequence[str] | None = None,
        *,
        kind: str = "auto",
        dtype: str = "uint16",
        tokenizer: TokenizerSpec | None = None,
        vocab_size: int | None = None,
        val_fraction: float = 0.005,
        verify: str = "sha256",
        folder: str | None = None,
    ) -> None:
        for name, value, allowed in (
            ("kind", kind, ("auto", *KINDS)),
            ("dtype", dtype, ("uint16", "uint32")),
            ("verify", verify, ("sha256", "size")),
        ):
            if value not in allowed:
                raise ValueError(f"data.{name}={value!r}: allowed are {', '.join(allowed)}")
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction={val_fraction}: must lie strictly between 0 and 1")
        self._tokenizer = None if tokenizer is None else ready_tokenizer(tokenizer)
        if vocab_size is None and self._tokenizer is None:
            raise ValueError(
                "data.vocab_size: the files do not say how many ids there are; name their tokenizer (data.tokenizer=tiktoken:gpt2) "
                "or give the number (data.vocab_size=50257)"
            )
        if vocab_size is not None and vocab_size < 1:
            raise ValueError(f"data.vocab_size={vocab_size}: must be 1 or more")
        self._vocab_size, self.train, self.val = vocab_size, train, val
        self.kind, self.dtype, self.val_fraction, self.verify = kind, dtype, val_fraction, verify
        self.folder = folder

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        if self._vocab_size is not None:
            return self._vocab_size
        assert self._tokenizer is not None
        return self._tokenizer.vocab_size

    def open(self, recorded: Mapping[str, Any] | None = None) -> TokenFileCorpus:
        corpus = TokenFileCorpus(self)
        check_recorded(recorded, corpus.identity(), "Bring the files of that run back")
        return corpus

    def layouts(self, paths: str | Sequence[str]) -> list[Layout]:
        """Of the files that ``paths`` names, in order. Raises ShardError."""
        found = [read_layout(path, self.kind, self.dtype) for path in _files(paths)]
        kinds = {(layout.kind, layout.stored) for layout in found}
        if len(kinds) > 1:
            named = ", ".join(sorted(f"{kind} {stored.name}" for kind, stored in kinds))
            raise ShardError(
                f"token files {paths}: they are of several kinds ({named}); give those of one kind"
            )
        return found


def _files(paths: str | Sequence[str]) -> list[Path]:
    """Raises ShardError where a name matches nothing."""
    found: list[Path] = []
    for pattern in [paths] if isinstance(paths, str) else list(paths):
        path = Path(pattern).expanduser()
        if path.is_dir():
            matches = sorted(p for p in path.glob("*.bin") if p.is_file())
        elif path.is_file():
            matches = [path.with_suffix(".bin") if path.suffix == ".idx" else path]
        elif path.with_name(path.name + ".bin").is_file():
            matches = [path.with_name(path.name + ".bin")]
        else:
            matches = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.suffix != ".idx")
        if not matches:
            raise ShardError(
                f"no token file matches {pattern!r}; give a .bin file, a folder with some, or a pattern such as "
                "'shards/*_train_*.bin'"
            )
        found += matches
    if len(set(found)) < len(found):
        raise ShardError(f"token files {paths}: a file is named twice")
    return found


class TokenFileCorpus:
    """Opened and checked files."""

    def __init__(self, plan: TokenFiles) -> None:
        self.plan, self._facts = plan, []  # type: ignore[var-annotated]
        layouts = plan.layouts(plan.train)
        train = self._split("train", layouts)
        if plan.val is not None:
            self.train, self.val = train, self._split("val", plan.layouts(plan.val))
        else:
            cut = _cut(layouts, plan.val_fraction)
            self.train = train.part("train", 0, cut)
            self.val = train.part("val", cut, len(train))

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.plan.tokenizer

    def _split(self, name: str, layouts: Sequence[Layout]) -> TokenSplit:
        segments = []
        for layout in layouts:
            check = _whole_check if self.plan.verify == "sha256" else _sampled_check
            facts = check(layout, self.plan.vocab_size, self.plan.folder)
            index = hashlib.sha256(layout.index).hexdigest() if layout.index else None
            self._facts.append([name, layout.kind, layout.stored.name, layout.size, facts["identity"], index])
            file = CheckedFile(
                layout.path,
                ShardInfo(layout.path.name, layout.tokens, layout.size, facts["sha256"]),
                _wording(layout.path),
            )
            file.open(hashed=False)
            segments += [Segment(file, offset, count) for offset, count in layout.segments]
        restore = "bring the original files back"
        return TokenSplit(
            name, layouts[0].path.parent, segments, layouts[0].stored, self.plan.vocab_size, restore
        )

    def identity(self) -> dict[str, Any]:
        """By the bytes of the files (``verify=size``: by sizes and times), wherever they lie."""
        cut = None if self.plan.val is not None else len(self.train)
        digest = hashlib.sha256(json.dumps([self._facts, cut]).encode()).hexdigest()
        return {
            "shards": f"{self._facts[0][1]}-{digest[:16]}",
            "fingerprint": digest,
            **tokenizer_identity(self.tokenizer),
        }

    def train_windows(self, sequence_tokens: int, seed: int) -> TokenWindows:
        return TokenWindows(self.train, sequence_tokens, seed)

    def validation(self, sequence_tokens: int, max_windows: int | None) -> ValidationSet:
        windows = ValidationWindows(self.val, sequence_tokens, max_windows)
        return ValidationSet.single(windows, self.tokens_per_byte)

    @cached_property
    def tokens_per_byte(self) -> float | None:
        """Of the first 4M tokens of the validation split, by decoding them."""
        tokenizer, end = self.plan.tokenizer, min(len(self.val), _DECODED_TOKENS)
        if tokenizer is None:
            return None
        text_bytes = 0
        for start in range(0, end, _BLOCK_TOKENS):
            ids = self.val.read(start, min(start + _BLOCK_TOKENS, end))
            text_bytes += len(tokenizer.decode(ids).encode("utf-8"))
        return end / text_bytes if text_bytes else None

    def check_unchanged(self) -> None:
        self.train.check_unchanged()
        self.val.check_unchanged()


def _wording(path: Path) -> Wording:
    return Wording(
        "token file",
        "when it was checked it had",
        f"bring the original {path.name} back",
        f"bring the original {path.name} back and resume from a checkpoint from before that",
    )


def _cut(layouts: Sequence[Layout], fraction: float) -> int:
    """The first token of the validation split at the end of the files: a document's first, where those are known."""
    total = sum(layout.tokens for layout in layouts)
    wanted = total - max(1, round(total * fraction))
    if layouts[0].documents is None:
        return wanted
    starts, before = [], 0
    for layout in layouts:
        assert layout.documents is not None
        starts.append(layout.documents + before)
        before += layout.tokens
    documents = np.concatenate(starts)
    usable = documents[(documents > 0) & (documents < total)]
    if not len(usable):
        raise ShardError(
            f"token file {layouts[0].path} holds one document, of which none can be held out; give data.val a file"
        )
    return int(usable[np.argmin(np.abs(usable - wanted))])


def _check_largest(layout: Layout, largest: int, least: int, vocab_size: int) -> None:
    if largest >= vocab_size or least < 0:
        raise ShardError(
            f"token file {layout.path} holds the id {largest if largest >= vocab_size else least}, outside the vocabulary "
            f"[0, {vocab_size}); name the tokenizer that made it (data.tokenizer), its vocab_size, or its dtype"
        )


def _reader(layout: Layout) -> tuple[int, Callable[[int, int], bytes]]:
    try:
        handle = os.open(layout.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ShardError(f"token file {layout.path} cannot be opened: {error.strerror}") from error
    return handle, lambda count, offset: os.pread(handle, count, offset)


def _whole_check(layout: Layout, vocab_size: int, folder: str | None) -> dict[str, Any]:
    """sha256, largest and least id, from the cache where the file is that of last time."""
    root = Path(folder) if folder is not None else cache_root()
    name = hashlib.sha256(str(layout.path.resolve()).encode()).hexdigest()[:32]
    kept = root / "token-files" / f"{name}.json"
    handle, pread = _reader(layout)
    try:
        stamp = FileStamp.of(handle)
        segments = [list(segment) for segment in layout.segments]
        key = {**asdict(stamp), "settled": True, "stored": layout.stored.str, "segments": segments}
        facts = _kept(kept, key)
        if facts is None:
            facts = _measured(layout, pread)
            if FileStamp.of(handle) != stamp:
                raise ShardError(
                    f"token file {layout.path} changed while it was read; start again when it is whole"
                )
            if stamp.settled:
                _keep(kept, {"file": str(layout.path), "key": key, "facts": facts})
    finally:
        os.close(handle)
    _check_largest(layout, facts["largest"], facts["least"], vocab_size)
    return {"sha256": facts["sha256"], "identity": facts["sha256"]}


def _kept(path: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # nothing kept, or half of it: the file is read once more
        return None
    return found["facts"] if found.get("key") == key else None


def _keep(path: Path, record: Mapping[str, Any]) -> None:
    """Raises ShardError where the cache cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(record), encoding="utf-8")
        temporary.rename(path)
    except OSError as error:
        raise ShardError(
            f"what was found of token files cannot be kept in {path.parent}: {error.strerror}; give another place with "
            "data.folder=DIR, or take data.verify=size, which keeps nothing"
        ) from error


def _measured(layout: Layout, pread: Callable[[int, int], bytes]) -> dict[str, Any]:
    """Reads the whole file once."""
    width, digest, at = layout.stored.itemsize, hashlib.sha256(), 0
    largest, least = 0, 0
    while block := pread(_BLOCK_TOKENS * width, at):
        digest.update(block)
        at += len(block)
    for offset, count in layout.segments:
        for start in range(0, count, _BLOCK_TOKENS):
            wanted = min(_BLOCK_TOKENS, count - start) * width
            ids = np.frombuffer(pread(wanted, offset + start * width), layout.stored)
            largest, least = max(largest, int(ids.max())), min(least, int(ids.min()))
    return {"sha256": digest.hexdigest(), "largest": largest, "least": least}


def _sampled_check(layout: Layout, vocab_size: int, folder: str | None) -> dict[str, Any]:
    width, largest, least = layout.stored.itemsize, 0, 0
    handle, pread = _reader(layout)
    try:
        modified = os.fstat(handle).st_mtime_ns
        for offset, count in layout.segments[:: max(1, len(layout.segments) // _SAMPLED_BLOCKS)]:
            for start in np.linspace(0, max(0, count - _SAMPLED_TOKENS), _SAMPLED_BLOCKS).astype(int):
                data = pread(min(_SAMPLED_TOKENS, count - int(start)) * width, offset + int(start) * width)
                ids = np.frombuffer(data, layout.stored)
                largest, least = max(largest, int(ids.max())), min(least, int(ids.min()))
    finally:
        os.close(handle)
    _check_largest(layout, largest, least, vocab_size)
    return {"sha256": None, "identity": modified}
