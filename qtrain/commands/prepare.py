"""qtrain prepare: from raw text to token shards, ahead of the run that reads them.

``qtrain train`` with the same ``data`` finds them, and prepares by itself what it does not find.
"""

from __future__ import annotations

import sys
from typing import Any

from omegaconf import DictConfig

from .train import plain

CONFIG = "prepare"


def _parts(config: dict[str, Any]) -> tuple[Any, Any]:
    """(source, tokenizer), neither of which has read any text."""
    from qtrain.data.tokenizers import get_tokenizer
    from qtrain.training.assembly import build

    if "source" not in config["data"]:
        raise ValueError(
            "data: there is no source to prepare; token files and streams are read as they are, and of a mixture each part is prepared by itself"
        )
    return build(config["data"]["source"]), get_tokenizer(config["data"]["tokenizer"])


def check(cfg: DictConfig) -> None:
    """Raises ValueError for values that cannot be right."""
    from qtrain.data.object_store import check_address, is_address
    from qtrain.data.parted import check_parts
    from qtrain.data.prepare import check_settings

    config = plain(cfg)
    data = config["data"]
    _parts(config)
    check_settings(data["val_fraction"], data["num_workers"])
    if is_address(data["folder"]):
        check_address(data["folder"])
    check_parts(config["stage"], config["part"], config["parts"])


def run(cfg: DictConfig) -> int:
    """Prepares, and prints the folder and what it holds. 2 where the source or the place does not allow it."""
    from qtrain.data.optional_libraries import LibraryMissing
    from qtrain.data.progress import shown_progress
    from qtrain.data.read_ahead import StreamError
    from qtrain.data.shard_writer import ShardWriteError
    from qtrain.data.shards import ShardError
    from qtrain.data.sources import SourceError
    from qtrain.data.tokenizers import TokenizerError
    from qtrain.data.worker_pool import WorkerDied

    config = plain(cfg)
    try:
        with shown_progress() as progress:
            shards = _prepared(config, progress)
    except (
        SourceError, TokenizerError, LibraryMissing, ShardError, ShardWriteError, StreamError, WorkerDied,
    ) as error:  # fmt: skip
        print(f"qtrain: {error}", file=sys.stderr)
        return 2
    if shards is not None:
        print_summary(shards, config["data"]["folder"])
    return 0


def _prepared(config: dict[str, Any], progress: Any) -> Any:
    """The prepared data; None after a stage of a part that others have to follow."""
    from qtrain.data.object_store import is_address
    from qtrain.data.parted import PartedPreparation
    from qtrain.data.shard_writer import DEFAULT_SHARD_TOKENS
    from qtrain.data.stored_shards import prepare_in, put_in

    data, stage, part = config["data"], config["stage"], config["part"]
    source, tokenizer = _parts(config)
    settings = {
        "shard_tokens": data.get("shard_tokens", DEFAULT_SHARD_TOKENS),
        "val_fraction": data["val_fraction"],
        "num_workers": data["num_workers"],
        "progress": progress,
    }
    if stage is None:
        return prepare_in(data["folder"], source, tokenizer, **settings)
    tasks = PartedPreparation(
        source, tokenizer, config["parts"], None if is_address(data["folder"]) else data["folder"], **settings
    )
    done = tasks.merge() if stage == "merge" else getattr(tasks, stage)(part)
    if done is None:
        print(f"stage {stage} of part {part} is done; the parts' work lies in {tasks.work}")
        return None
    return put_in(data["folder"], done)


def print_summary(shards: Any, folder: str | None) -> None:
    """The folder, which lies in ``folder`` where that is an address, and of each split tokens, documents and bytes."""
    from qtrain.data.object_store import is_address

    about, source = shards.manifest.tokenizer, shards.manifest.source
    print(f"{str(folder).rstrip('/')}/{shards.directory.name}" if is_address(folder) else shards.directory)
    print(
        f"tokenizer  {about['name']}: {about['vocab_size']:,} ids as {shards.manifest.dtype}, end of text {about['eot_token']}"
    )
    for split in (shards.train, shards.val):
        info = split.info
        print(
            f"{split.name:<9}  {info.tokens:,} tokens, {info.documents:,} documents, {info.text_bytes:,} bytes: "
            f"{1 / split.tokens_per_byte:.2f} bytes a token"
        )
    sides = source["sides"]
    print(
        f"left out   {sides['exact_duplicate']:,} duplicates, {sides['near_duplicate']:,} near-duplicates of validation "
        f"documents, {source['skipped']:,} that are no text"
    )
