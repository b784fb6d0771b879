"""What a folder of token shards says about itself: ``manifest.json``.

    DIR/manifest.json        format version, tokenizer, dtype, and of each shard: file, tokens, bytes, sha256
    DIR/tokenizer/           the tokenizer by its contents (``qtrain.data.tokenizers``)
    DIR/train-00000.bin ...  little-endian uint16 (vocabularies up to 65,536) or uint32, no header
    DIR/val-00000.bin ...

It is written by ``shard_writer`` and believed by ``shards``, which checks the files against it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
SPLITS = ("train", "val")


@dataclass(frozen=True)
class ShardInfo:
    """One file. ``bytes``: of the whole file; in a prepared folder ``tokens`` * item size of the dtype."""

    file: str
    tokens: int
    bytes: int
    sha256: str | None


@dataclass(frozen=True)
class SplitInfo:
    """One split. ``text_bytes``: UTF-8 bytes of its documents, the denominator of bits per byte."""

    tokens: int
    documents: int
    text_bytes: int
    shards: tuple[ShardInfo, ...]


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says. ``tokenizer``: kind, name, vocab_size, eot_token and digest of its contents."""

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
