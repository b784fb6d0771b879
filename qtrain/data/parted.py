"""A preparation by several tasks, such as those of a batch system's array: the same bytes as by one.

    scan(part)     reads its share of the source; keeps a digest of each document, and the windows of what may be validation
      settle       once all scans are there: exact duplicates and sides, over all; a BPE, where one is to be trained
    encode(part)   reads its share again: near-duplicates are left out, the others become ids, in a folder of its own
    merge()        once all parts are there: the folders' tokens one after the other, in shards of the usual size

Whichever task finishes a stage last goes on with what follows it, so that merging needs no task of its own. All that the
tasks share lies in one work folder beside the result. Every file in it is a function of the source and the settings, is
written beside its place and renamed: a killed task leaves nothing that counts, and is run again alone. Where two do the
same at once, both write the same; a lock spares the work. Where the file system cannot lock, one of two that join the
parts at once may fail on what the other has cleared, and finds the result when it is run again.

Memory: some 60 bytes a document of the whole source while its sides are settled, and twice the bytes of the validation texts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qtrain.data import splits
from qtrain.data.cache import cache_root
from qtrain.data.manifest import FORMAT_VERSION, SPLITS, TOKENIZER
from qtrain.data.prepare import (
    changed_meanwhile,
    check_settings,
    description,
    encode,
    folder_name,
    open_prepared,
    settings_of,
    trained,
)
from qtrain.data.progress import Progress, no_progress
from qtrain.data.shard_writer import DEFAULT_SHARD_TOKENS, ShardWriter, write_shards, writing
from qtrain.data.shards import TokenShards, TokenSplit
from qtrain.data.sources import SharedSource, SourceError
from qtrain.data.splits import Assignment, Scan, Side, WindowTable
from qtrain.data.tokenizers import BpeTraining, Tokenizer, load_tokenizer

STAGES = ("scan", "encode", "merge")
_MERGED, _SIDES = "merged.json", "sides.npz"
_TABLE = ("sizes", "hashes", "owners")
# Tokens of a part that are copied at once
_BLOCK_TOKENS = 1 << 22


class PartsMissing(SourceError):
    """A stage needs what tasks before it have not left yet."""


def check_parts(stage: str | None, part: int | None, parts: int | None) -> None:
    """Raises ValueError for a task that there cannot be."""
    if stage is None and part is None and parts is None:
        return
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r}: a preparation in parts has the stages {', '.join(STAGES)}")
    if isinstance(parts, bool) or not isinstance(parts, int) or parts < 1:
        raise ValueError(f"parts={parts!r}: give the number of tasks, 1 or more, the same to all of them")
    if stage == "merge":
        if part is not None:
            raise ValueError(f"part={part!r}: merging is one task; leave part out")
    elif isinstance(part, bool) or not isinstance(part, int) or not 0 <= part < parts:
        raise ValueError(
            f"part={part!r}: stage={stage} needs the task's number, 0 to {parts - 1} of parts={parts}"
        )


class PartedPreparation:
    """The tasks of one preparation. out_dir and settings: as ``prepare`` has them. Each stage returns the finished data
    where it, or another task, completed them, else None; and raises as ``prepare`` does, and PartsMissing."""

    def __init__(
        self,
        source: SharedSource,
        tokenizer: Tokenizer | BpeTraining,
        parts: int,
        out_dir: str | Path | None = None,
        *,
        val_fraction: float = 0.05,
        shard_tokens: int = DEFAULT_SHARD_TOKENS,
        num_workers: int | None = None,
        progress: Progress = no_progress,
    ) -> None:
        check_settings(val_fraction, num_workers)
        self.source, self.tokenizer, self.parts = source, tokenizer, parts
        self.settings = settings_of(val_fraction, shard_tokens)
        self.num_workers, self.progress = num_workers, progress
        self.root = Path(out_dir) if out_dir is not None else cache_root()
        stamp = [FORMAT_VERSION, source.stamp(), tokenizer.digest, self.settings, parts]
        digest = hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()[:16]
        self.work = self.root / f"parts-{source.name}-{tokenizer.name}-{digest}"
        with writing(self.work):
            self.work.mkdir(parents=True, exist_ok=True)

    def _place(self, kind: str, part: int) -> Path:
        return self.work / (f"scan-{part:05d}.npz" if kind == "scan" else f"part-{part:05d}")

    def _missing(self, kind: str) -> list[int]:
        return [part for part in range(self.parts) if not self._place(kind, part).exists()]

    def _merged(self) -> TokenShards | None:
        """The result, where it is there."""
        try:
            name = json.loads((self.work / _MERGED).read_text(encoding="utf-8"))["folder"]
        except FileNotFoundError:
            return None
        return open_prepared(self.root / name) if (self.root / name).is_dir() else None

    def scan(self, part: int) -> TokenShards | None:
        if (done := self._merged()) is not None:
            return done
        if not self._place("scan", part).exists():
            share = self.source.share(part, self.parts)
            found = splits.scanned(
                share.documents(),
                self.settings["val_fraction"],
                lambda done: self.progress("scan", done, None),
            )
            about = {"skipped": share.skipped, "facts": share.facts()}
            self._keep(self._place("scan", part), **_arrays_of(found), about=_as_bytes(about))
        if not self._missing("scan"):
            self._settle()
        return None

    def _settle(self) -> None:
        """Sides and tokenizer, by one task."""
        with _lock(self.work / "settle.lock"):
            if (self.work / TOKENIZER).exists() and (self.work / _SIDES).exists():
                return
            scans = [_read_scan(self._place("scan", part))[0] for part in range(self.parts)]
            found = splits.settled_sides(scans, self.source.name, self.settings["val_fraction"])
            tokenizer = trained(self.source, self.tokenizer, found, self.progress)
            counts = np.array([len(scan.digests) for scan in scans])
            sizes = np.array([scan.text_bytes for scan in scans])
            table = {f"table_{name}": getattr(found.table, name) for name in _TABLE}
            self._keep(self.work / _SIDES, sides=found.sides, counts=counts, bytes=sizes, **table)
            with writing(self.work):
                tokenizer.save(self.work / TOKENIZER)

    def _assignment(self, part: int) -> Assignment:
        """Of a part's documents."""
        with np.load(self.work / _SIDES) as kept:
            bounds = np.concatenate([[0], np.cumsum(kept["counts"])])
            sides = kept["sides"][bounds[part] : bounds[part + 1]]
            table = WindowTable.of(*(kept[f"table_{name}"] for name in _TABLE))
            return Assignment(sides, table, int(kept["bytes"][part]))

    def encode(self, part: int) -> TokenShards | None:
        if (done := self._merged()) is not None:
            return done
        self._check("scan", "scan")
        self._settle()
        place = self._place("part", part)
        if not place.exists():
            tokenizer, share = load_tokenizer(self.work / TOKENIZER), self.source.share(part, self.parts)
            described: dict[str, Any] = {}
            with self._writer(place, tokenizer, described) as writer:
                counts = encode(
                    share, self._assignment(part), tokenizer, self.num_workers, writer, self.progress
                )
                described["sides"] = {side.name: counts[side] for side in Side}
                if share.facts() != _read_scan(self._place("scan", part))[1]["facts"]:
                    raise changed_meanwhile(self.source.name)
        return None if self._missing("part") else self.merge()

    def merge(self) -> TokenShards:
        with _lock(self.work / "merge.lock"):
            if (done := self._merged()) is not None:
                return done
            self._check("scan", "scan")
            self._check("part", "encode")
            abouts = [_read_scan(self._place("scan", part)) for part in range(self.parts)]
            fingerprint = self.source.fingerprint_of([fact for _, about in abouts for fact in about["facts"]])
            skipped = self.source.skipped_of(
                [(len(scan.digests), about["skipped"]) for scan, about in abouts]
            )
            documents = sum(len(scan.digests) for scan, _ in abouts)
            described = description(self.source.name, fingerprint, documents, skipped)
            name = folder_name(self.source.name, fingerprint, self.tokenizer, self.settings)
            if not (self.root / name).is_dir():
                self._write(self.root / name, described)
            with writing(self.work):
                _write_whole(self.work / _MERGED, json.dumps({"folder": name}).encode())
                self._clear()
            return open_prepared(self.root / name)

    def _writer(
        self, directory: Path, tokenizer: Tokenizer, described: dict[str, Any]
    ) -> AbstractContextManager[ShardWriter]:
        """described: kept in the manifest as it is when the folder is published, so that it may be filled until then."""
        settings = self.settings
        return write_shards(
            directory,
            tokenizer,
            source=described,
            settings=settings,
            shard_tokens=settings["shard_tokens"],
        )

    def _write(self, directory: Path, described: dict[str, Any]) -> None:
        found = [TokenShards.open(self._place("part", part)) for part in range(self.parts)]
        counts: Counter[Side] = Counter()
        for shards in found:
            counts.update({Side[name]: n for name, n in shards.manifest.source["sides"].items()})
        splits.check_sides(counts, self.source.name, self.settings["val_fraction"])
        described["sides"] = {side.name.lower(): counts[side] for side in Side}
        tokenizer = load_tokenizer(self.work / TOKENIZER)
        with self._writer(directory, tokenizer, described) as writer:
            for done, shards in enumerate(found, start=1):
                for split in SPLITS:
                    tokens = getattr(shards, split)
                    writer.append_split(split, _blocks(tokens), tokens.info.documents, tokens.info.text_bytes)
                self.progress("merge (parts)", done, self.parts)

    def _check(self, kind: str, stage: str) -> None:
        if missing := self._missing(kind):
            listed = ", ".join(map(str, missing))
            raise PartsMissing(
                f"{len(missing)} of {self.parts} parts have not ended stage={stage} in {self.work}: {listed}; run those tasks "
                f"(again): stage={stage} part={missing[0]} parts={self.parts}"
            )

    def _clear(self) -> None:
        """What the parts left is in the result now; the note that says so stays, for a task that comes late."""
        for path in self.work.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.suffix == ".npz":
                path.unlink(missing_ok=True)

    def _keep(self, path: Path, **arrays: NDArray[Any]) -> None:
        with writing(self.work):
            partial = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.npz")
            try:
                with partial.open("wb") as file:
                    np.savez(file, **arrays)  # type: ignore[arg-type]
                    file.flush()
                    os.fsync(file.fileno())
                partial.rename(path)
            finally:
                partial.unlink(missing_ok=True)


def _write_whole(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _as_bytes(value: Any) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def _arrays_of(scan: Scan) -> dict[str, NDArray[Any]]:
    hashes = [np.empty(0, np.uint64), *scan.windows.values()]
    return {
        "digests": scan.digests,
        "text_bytes": np.array(scan.text_bytes),
        "candidates": np.frombuffer(b"".join(scan.windows), np.uint8).reshape(-1, scan.digests.shape[1]),
        "sizes": np.array([len(h) for h in hashes[1:]], dtype=np.int64),
        "hashes": np.concatenate(hashes),
    }


def _read_scan(path: Path) -> tuple[Scan, dict[str, Any]]:
    """(scan, what is kept beside it)."""
    with np.load(path) as kept:
        pieces = np.split(kept["hashes"], np.cumsum(kept["sizes"]))[:-1]
        windows = {digest.tobytes(): piece for digest, piece in zip(kept["candidates"], pieces, strict=True)}
        return Scan(kept["digests"], windows, int(kept["text_bytes"])), json.loads(kept["about"].tobytes())


def _blocks(split: TokenSplit) -> Iterator[NDArray[Any]]:
    for start in range(0, len(split), _BLOCK_TOKENS):
        yield split.read(start, min(start + _BLOCK_TOKENS, len(split)))


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One task at a time, where the file system can lock between machines."""
    with path.open("a") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
