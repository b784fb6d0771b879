"""A prepared folder by its own name: a path here, or an address in an object store."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from qtrain.data.corpus import PreparedCorpus, TokenizerSpec, check_order, check_recorded, ready_tokenizer
from qtrain.data.object_store import check_address, is_address
from qtrain.data.prepare import open_prepared
from qtrain.data.shards import TokenShards
from qtrain.data.stored_shards import DEFAULT_CACHE_GIB, begin_fetching, fetched_shards, open_stored
from qtrain.data.tokenizers import Tokenizer


class PreparedFolder:
    """address: of the folder that ``qtrain prepare`` printed. shuffle: ``shards``, one after the other with its windows
    shuffled, or ``windows`` of all shards together, for which all are fetched. cache_gib, folder: how much of fetched
    shards this machine keeps, and where (None: in ``cache_root()``). tokenizer: the folder's own (None), or one with the
    same contents, as a checkpoint brings it.

    Raises ValueError, naming the value and the remedy.
    """

    def __init__(
        self,
        address: str,
        *,
        shuffle: str = "shards",
        tokenizer: TokenizerSpec | None = None,
        cache_gib: float = DEFAULT_CACHE_GIB,
        folder: str | None = None,
    ) -> None:
        self.address = check_address(address) if is_address(address) else str(Path(address).expanduser())
        self.shuffle, self._given = check_order(shuffle), tokenizer
        self.cache = fetched_shards(folder, cache_gib)

    @cached_property
    def _shards(self) -> TokenShards:
        """Of an address, the manifest and the tokenizer are read."""
        if is_address(self.address):
            return open_stored(self.address, self.cache)
        return open_prepared(Path(self.address))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self._shards.tokenizer if self._given is None else ready_tokenizer(self._given)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def open(self, recorded: Mapping[str, Any] | None = None) -> PreparedCorpus:
        shards = self._shards
        corpus = PreparedCorpus(shards, self.shuffle, at_hand=not is_address(self.address))
        check_recorded(recorded, corpus.identity(), "Give the address of that folder")
        if self._given is not None and self.tokenizer.digest != shards.tokenizer.digest:
            raise ValueError(
                f"data.tokenizer={self.tokenizer.name}: the tokens at {self.address} were made by another one, "
                f"{shards.tokenizer.name}; leave data.tokenizer out"
            )
        if is_address(self.address):
            begin_fetching(shards, self.shuffle)
        return corpus
