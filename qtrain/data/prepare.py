"""Preparation: source + tokenizer -> token shards, once, found again by content.

The folder's name carries a digest of everything that decides its contents (the fingerprint of the documents,
the tokenizer, the split's settings, the format), so a changed corpus or setting never reads stale tokens and
an unchanged one costs a fingerprint and a checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qtrain.data import splits
from qtrain.data.manifest import FORMAT_VERSION
from qtrain.data.partial_folders import remove_stale
from qtrain.data.shard_writer import DEFAULT_SHARD_TOKENS, write_shards, writing
from qtrain.data.shards import TokenShards
from qtrain.data.sources import TextSource
from qtrain.data.splits import Side
from qtrain.data.tokenizers import Tokenizer

# (stage, documents done, documents in all or None where that is not known yet)
Progress = Callable[[str, int, int | None], None]

# Raised whenever the same settings begin to give other tokens.
PREPARATION_VERSION = 1
# 16 hex digits = 64 bits: folders of one cache root never collide by chance.
_DIGEST_DIGITS = 16


def cache_root() -> Path:
    """``$QTRAIN_CACHE`` or, without it, ``~/.cache/qtrain/data``."""
    given = os.environ.get("QTRAIN_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "qtrain" / "data"


def _no_progress(stage: str, done: int, total: int | None) -> None:
    pass


def prepare(
    source: TextSource,
    tokenizer: Tokenizer,
    out_dir: str | Path | None = None,
    *,
    val_fraction: float = 0.05,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    progress: Progress | None = None,
) -> TokenShards:
    """Token shards of ``source``, from the cache or newly written.

    ``out_dir``: the folder that holds prepared folders; None means ``cache_root()``. The result lies in
    ``out_dir/SOURCE-TOKENIZER-DIGEST``. Every document is followed by the end-of-document token.
    ``val_fraction``: expected share of documents in the validation split (see ``splits``).
    ``progress``: called after each document; ``rich_progress`` makes one.
    Raises ValueError on an empty split or a source's name that is no folder's, ShardError when the cached folder
    was altered, ShardWriteError when the place cannot be written (a full disk, no permission) and RuntimeError
    when the source changes meanwhile.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", source.name):
        raise ValueError(
            f"source name {source.name!r}: it names a folder; letters, digits, - and _ are allowed"
        )
    progress = progress or _no_progress
    settings: dict[str, Any] = {
        "preparation_version": PREPARATION_VERSION,
        "val_fraction": val_fraction,
        "near_duplicate_share": splits.NEAR_DUPLICATE_SHARE,
        "window_bytes": splits.WINDOW_BYTES,
        "sample_modulus": splits.SAMPLE_MODULUS,
        "min_samples": splits.MIN_SAMPLES,
        "shard_tokens": shard_tokens,
    }
    progress("fingerprint", 0, None)
    fingerprint = source.fingerprint()
    identity = [FORMAT_VERSION, fingerprint, tokenizer.name, tokenizer.vocab_size, settings]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:_DIGEST_DIGITS]
    root = Path(out_dir) if out_dir is not None else cache_root()
    directory = root / f"{source.name}-{tokenizer.name}-{digest}"
    remove_stale(directory)
    with writing(directory):
        exists = directory.exists()
    if not exists:
        _write(source, fingerprint, tokenizer, directory, settings, progress)
    return TokenShards.open(directory)


def _write(
    source: TextSource,
    fingerprint: str,
    tokenizer: Tokenizer,
    directory: Path,
    settings: dict[str, Any],
    progress: Progress,
) -> None:
    assignment = splits.assign_sides(
        source, settings["val_fraction"], lambda done: progress("deduplicate and split", done, None)
    )
    total = len(assignment.sides)
    described = {
        "name": source.name,
        "fingerprint": fingerprint,
        "documents": total,
        "sides": assignment.counts,
        "undecodable": list(source.skipped),
    }
    folders = {Side.TRAIN: "train", Side.VAL: "val"}
    with write_shards(
        directory, tokenizer, source=described, settings=settings, shard_tokens=settings["shard_tokens"]
    ) as writer:
        for done, (side, text) in enumerate(splits.labelled(source, assignment), start=1):
            if side in folders:
                writer.append(folders[side], text)
            progress("tokenize", done, total)
        if source.fingerprint() != fingerprint:
            raise RuntimeError(
                f"source {source.name!r} changed while it was being prepared, so nothing was kept; prepare again "
                "when nobody writes to it"
            )


@contextmanager
def rich_progress() -> Iterator[Progress]:
    """``with rich_progress() as progress: prepare(..., progress=progress)``: a bar a stage on the terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns) as bar:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield update
