"""Preparation: source + tokenizer -> token shards, once, found again by content.

The folder's name carries a digest of everything that decides its contents (the fingerprint of the documents,
the tokenizer, the split's settings, the format), so a changed corpus or setting never reads stale tokens, and an
unchanged one costs a look at the inodes of its files (``RememberedDigests``).

    pass 1   a hash of each document finds exact duplicates and decides its side (``splits``)
    pass 2   a BPE learns from the training documents, where one is to be trained
    pass 3   near-duplicates of validation documents are left out, the others become ids, in several processes

No pass holds more than a few batches of documents, and the number of processes changes no byte.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from qtrain.data import splits
from qtrain.data.cache import RememberedDigests, cache_root
from qtrain.data.encoding import DocumentEncoder, in_batches
from qtrain.data.manifest import FORMAT_VERSION
from qtrain.data.partial_folders import remove_stale
from qtrain.data.progress import Progress, no_progress
from qtrain.data.shard_writer import DEFAULT_SHARD_TOKENS, ShardWriter, write_shards, writing
from qtrain.data.shards import TokenShards
from qtrain.data.sources import TextSource
from qtrain.data.splits import Assignment, Side
from qtrain.data.tokenizers import BpeTraining, Tokenizer
from qtrain.data.worker_pool import map_in_order, usable_cores

# Raised whenever the same settings begin to give other tokens.
PREPARATION_VERSION = 1
# 16 hex digits = 64 bits: folders of one cache root never collide by chance.
_DIGEST_DIGITS = 16
# A process starts in about a second, in which one core encodes a megabyte or two
_BYTES_PER_WORKER = 4 << 20
# Ids of skipped documents that the manifest lists; all are counted
_SKIPPED_LISTED = 100
_FOLDERS = {Side.TRAIN: "train", Side.VAL: "val"}


def prepare(
    source: TextSource,
    tokenizer: Tokenizer | BpeTraining,
    out_dir: str | Path | None = None,
    *,
    val_fraction: float = 0.05,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    num_workers: int | None = None,
    progress: Progress = no_progress,
) -> TokenShards:
    """Token shards of ``source``, from the cache or newly written.

    ``tokenizer``: one, or the training of one, on the training documents alone. ``out_dir``: the folder that holds
    prepared folders; None means ``cache_root()``. The result lies in ``out_dir/SOURCE-TOKENIZER-DIGEST``. Every document
    is followed by the end-of-text token. ``val_fraction``: expected share of documents in the validation split (see
    ``splits``). ``num_workers``: processes that encode; None: the usable cores, fewer for little text.
    ``progress``: called as it goes on; ``shown_progress`` makes one.
    Raises SourceError where the text cannot be read or leaves a split empty, TokenizerError where a BPE cannot be
    trained, ValueError on a source's name that is no folder's, ShardError when the cached folder
    was altered, ShardWriteError when the place cannot be written (a full disk, no permission), WorkerDied when a process
    was killed, and RuntimeError when the source changes meanwhile. Nothing is left half-written.
    """
    check_settings(val_fraction, num_workers)
    settings = settings_of(val_fraction, shard_tokens)
    progress("fingerprint", 0, None)
    fingerprint = source.fingerprint()
    name = folder_name(source.name, fingerprint, tokenizer, settings)
    root = Path(out_dir) if out_dir is not None else cache_root()
    directory = root / name
    remove_stale(directory)
    with writing(directory):
        exists = directory.exists()
    if not exists:
        _write(source, fingerprint, tokenizer, directory, settings, num_workers, progress)
    return open_prepared(directory)


def settings_of(val_fraction: float, shard_tokens: int) -> dict[str, Any]:
    """What decides the tokens and the files beside source and tokenizer, as the manifest has it."""
    return {
        "preparation_version": PREPARATION_VERSION,
        "val_fraction": val_fraction,
        "near_duplicate_share": splits.NEAR_DUPLICATE_SHARE,
        "window_bytes": splits.WINDOW_BYTES,
        "sample_modulus": splits.SAMPLE_MODULUS,
        "min_samples": splits.MIN_SAMPLES,
        "shard_tokens": shard_tokens,
    }


def folder_name(
    source: str, fingerprint: str, tokenizer: Tokenizer | BpeTraining, settings: Mapping[str, Any]
) -> str:
    """SOURCE-TOKENIZER-DIGEST. Raises ValueError where the source's name is no folder's."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", source):
        raise ValueError(f"source name {source!r}: it names a folder; letters, digits, - and _ are allowed")
    identity = [FORMAT_VERSION, fingerprint, tokenizer.digest, settings]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:_DIGEST_DIGITS]
    return f"{source}-{tokenizer.name}-{digest}"


def check_settings(val_fraction: float, num_workers: int | None) -> None:
    """Raises ValueError for numbers that no preparation takes."""
    splits.check_fraction(val_fraction)
    if num_workers is not None and (isinstance(num_workers, bool) or num_workers < 1):
        raise ValueError(f"num_workers {num_workers} must be at least 1, or null for the usable cores")


def open_prepared(directory: Path) -> TokenShards:
    """``TokenShards.open``, but bytes that were checked before are not read again while their inodes are the same."""
    shards = TokenShards.open(directory, verify="size")
    files = [*shards.train.files, *shards.val.files]
    found = RememberedDigests([file.path for file in files]).get()
    if found != [file.info.sha256 for file in files]:
        return TokenShards.open(directory)  # says which one, and what to do
    return shards


def _write(
    source: TextSource,
    fingerprint: str,
    tokenizer: Tokenizer | BpeTraining,
    directory: Path,
    settings: dict[str, Any],
    num_workers: int | None,
    progress: Progress,
) -> None:
    assignment = splits.assign_sides(
        source, settings["val_fraction"], lambda done: progress("deduplicate and split", done, None)
    )
    described = description(source.name, fingerprint, len(assignment.sides), source.skipped)
    tokenizer = trained(source, tokenizer, assignment, progress)
    with write_shards(
        directory, tokenizer, source=described, settings=settings, shard_tokens=settings["shard_tokens"]
    ) as writer:
        counts = encode(source, assignment, tokenizer, num_workers, writer, progress)
        splits.check_sides(counts, source.name, settings["val_fraction"])
        described["sides"] = {side.name.lower(): counts[side] for side in Side}
        if source.fingerprint() != fingerprint:
            raise changed_meanwhile(source.name)


def description(name: str, fingerprint: str, documents: int, skipped: Sequence[str]) -> dict[str, Any]:
    """What the manifest says of the source, but for the ``sides``, which encoding finds."""
    return {
        "name": name,
        "fingerprint": fingerprint,
        "documents": documents,
        "skipped": len(skipped),
        "first_skipped": list(skipped[:_SKIPPED_LISTED]),
    }


def changed_meanwhile(name: str) -> RuntimeError:
    return RuntimeError(
        f"source {name!r} changed while it was being prepared, so nothing was kept; prepare again when nobody writes to it"
    )


def trained(
    source: TextSource, tokenizer: Tokenizer | BpeTraining, assignment: Assignment, progress: Progress
) -> Tokenizer:
    """``tokenizer``, where it is to be trained on the training documents of ``source``: so trained."""
    if isinstance(tokenizer, BpeTraining):
        return tokenizer.train(_training_texts(source, assignment, progress))
    return tokenizer


def _training_texts(source: TextSource, assignment: Assignment, progress: Progress) -> Iterator[str]:
    total = len(assignment.sides)
    for done, (side, text) in enumerate(splits.labelled(source, assignment), start=1):
        if assignment.table.settled(side, text) is Side.TRAIN:
            yield text
        progress("train the tokenizer", done, total)


def encode(
    source: TextSource,
    assignment: Assignment,
    tokenizer: Tokenizer,
    num_workers: int | None,
    writer: ShardWriter,
    progress: Progress,
) -> Counter[Side]:
    """Writes every document that stays; returns how many are on which side."""
    workers = num_workers or max(1, min(usable_cores(), assignment.text_bytes // _BYTES_PER_WORKER))
    encoder = DocumentEncoder(tokenizer, assignment.table)
    counts: Counter[Side] = Counter()
    batches = in_batches(splits.labelled(source, assignment))
    with closing(map_in_order(encoder, batches, workers)) as encoded:
        for batch in encoded:
            for document in batch:
                counts[document.side] += 1
                if document.ids is not None:
                    writer.append_tokens(_FOLDERS[document.side], document.ids, document.text_bytes)
            progress("tokenize", counts.total(), len(assignment.sides))
    return counts
